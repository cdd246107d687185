"""Advice that ends the error messages about Hugging Face files."""

REDOWNLOAD = "Fix: download the file again."
RESAVE = "Fix: re-save it with torch.save(model.state_dict(), path), or convert it to safetensors."
