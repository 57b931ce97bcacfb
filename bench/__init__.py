"""What is measured, and modelled: run from the repository's root (`python -m bench.roofline`); never installed."""

from bench.base import checkout  # noqa: F401 (its kernels/ are those of this checkout)
