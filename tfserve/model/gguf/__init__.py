"""GGUF: files read, and converted to checkpoints."""
