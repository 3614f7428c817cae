"""The supported model families. To add one, add a file here that registers it, and its name to this line."""

from tfserve.model.models import llama, mistral, qwen2, qwen3  # noqa: F401
