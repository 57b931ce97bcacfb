"""What is measured, and modelled: run from the repository's root (`python -m bench.roofline`); never installed."""
