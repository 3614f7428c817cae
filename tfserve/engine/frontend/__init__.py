"""The caller's side of an engine: validation, streams of outputs, and the link to the core process. Torch-free."""
