"""The model: configuration and weights in, logits and loss out; nothing here touches a file."""
