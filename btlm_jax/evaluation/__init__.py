"""What a model knows, in numbers: cross-entropy of texts."""
