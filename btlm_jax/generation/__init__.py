"""Text generation: sampling rules and the decoding loop."""
