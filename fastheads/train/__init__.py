"""Training, evaluation and reports for leave-one-domain-out experiments."""
