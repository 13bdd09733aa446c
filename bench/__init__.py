"""Benchmarks of the cost and the savings of microbatch, side by side with its alternatives: `python -m bench`."""
