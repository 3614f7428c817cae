"""Grammars: JSON schemas measured, checked and made into grammars. Torch-free."""
