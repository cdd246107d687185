"""Text to tokens to shards, for training and evaluation."""
