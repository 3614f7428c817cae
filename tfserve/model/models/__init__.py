"""The model families that can be served. A new one is a file here, which registers it, and its name in this line."""

from tfserve.model.models import llama, mistral, qwen2, qwen3  # noqa: F401
