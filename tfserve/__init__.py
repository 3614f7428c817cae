"""tfserve: an LLM inference server for people who stream text to people."""

__version__ = "0.1.0"
