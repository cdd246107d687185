"""Benchmarks, each beside a baseline or a limit measured in the same run."""
