"""Coordinate checks and learning-rate transfer across widths."""
