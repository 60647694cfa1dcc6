"""Timed comparisons of the real steps with a plain reference: `python -m benchmarks`."""
