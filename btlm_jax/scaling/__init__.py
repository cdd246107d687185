"""Predictions for large runs from small ones: timescales, curves, scaling laws; without JAX."""
