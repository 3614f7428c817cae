"""The OpenAI-compatible streaming HTTP server."""
