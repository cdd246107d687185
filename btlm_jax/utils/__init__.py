"""Files, progress, plots and formatting; nothing here knows the model."""
