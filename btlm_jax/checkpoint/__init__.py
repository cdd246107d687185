"""Checkpoints on disk: Orbax layout, metadata, checksums, quantized weights."""
