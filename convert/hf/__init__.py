"""Hugging Face files: found, checked, read and written."""
