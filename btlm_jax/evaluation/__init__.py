"""Evaluation: cross-entropy, loss by position, retrieval and lm-evaluation-harness."""
