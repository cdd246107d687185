"""Hugging Face checkpoints: opening, checking, reading and writing their files."""
