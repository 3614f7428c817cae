"""One server for all clients: a tiny random model whose template supports tools and their results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.conftest import TINY, save_random
from tests.serving import Server
from tests.tokenizers import write_tiny_tokenizer

TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n<tool_call>' + tools | tojson + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

ASK: list[dict[str, Any]] = [{"role": "user", "content": "Why is the sky blue?"}]

NO_END = {"2": -100}
"""logit_bias that keeps the random model from ending before max_tokens."""

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model_dir = tmp_path_factory.mktemp("clients")
    save_random(Qwen2ForCausalLM, Qwen2Config(**TINY, max_position_embeddings=1024), model_dir)
    write_tiny_tokenizer(model_dir)
    (model_dir / "chat_template.jinja").write_text(TEMPLATE)
    config = {"model": str(model_dir), "served_model_name": "tiny", "server": {"api_keys": ["key"]}}
    (model_dir / "tiny.yaml").write_text(json.dumps(config))
    with Server(model_dir / "tiny.yaml", model_dir / "log") as server:
        server.wait_until_ready()
        yield server
