"""The caller's side of an engine: validation, streams of outputs, and the client of the core process. Torch-free."""
