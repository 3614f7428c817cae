"""Scripted models: the whole real engine over a model that writes exactly what a test says.

    model_dir = write_scripted_model(tmp_path)
    with scripted_engine(model_dir, "Hello <tool_call>") as engine:
        engine.generate(...)
    async with scripted_server(model_dir, {"Rome": "sunny", "Oslo": ["rain", 2]}) as server:
        async with server.post("/v1/chat/completions", {...}) as response: ...

Only the layers are replaced: rows, blocks, preemption, sampler (penalties, biases, grammar masks), stops, detokenizer
and HTTP are the real ones. The next token of the script is far ahead of all others, so greedy and sampled requests both
write it; a mask or a bias of more than 50 overrules it. The script goes by position, so nothing that interrupts a
request disturbs it.

A script is text, or a list of token ids and texts; text is encoded as the tokenizer does it (special tokens in it
become their ids; a list of ids also writes parts of characters). The first end-of-sequence token of config.json follows
a script, again and again; `ends=False` repeats the script instead.

`script` is a script for all requests, or a mapping: the first key found in the text of a prompt names its script; or a
function from a prompt's token ids to a script. A prompt without a script fails its step.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import aiohttp
import torch
from torch import Tensor, nn

from tests.http.conftest import Running
from tests.tokenizers import CHAT_TEMPLATE, write_tiny_tokenizer
from tfserve.config import EngineConfig, config_from
from tfserve.engine.core import build
from tfserve.engine.engine import Engine
from tfserve.engine.frontend.core_client import ThreadClient
from tfserve.http.app import create_app
from tfserve.http.connections import create_runner
from tfserve.http.service import Service
from tfserve.model.loading.config import ModelConfig
from tfserve.model.runner.runner import ModelRunner
from tfserve.model.text.tokenizer import Tokenizer
from tfserve.plan import RequestId, SeqStep, StepPlan

Script = str | Sequence[int | str]
Scripts = Script | Mapping[str, Script] | Callable[[Sequence[int]], Script]

LEAD = 50.0
"""How far the script's token is ahead of the best other one, in logits."""


def write_scripted_model(model_dir: Path, chat_template: str = CHAT_TEMPLATE, **config: Any) -> Path:
    """A checkpoint directory without weights: a config.json (`config` goes into it) and the tiny tokenizer."""
    write_tiny_tokenizer(model_dir)
    (model_dir / "chat_template.jinja").write_text(chat_template)
    shape = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 512,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    (model_dir / "config.json").write_text(json.dumps({**shape, **config}))
    return model_dir


@contextmanager
def scripted_engine(model_dir: Path, script: Scripts, *, ends: bool = True, **settings: Any) -> Iterator[Engine]:
    """A running engine of `EngineConfig(**settings)`, its core in a thread, whose model writes `script`."""
    with Engine(_config(model_dir, settings), partial(_connect, script, ends)) as engine:
        yield engine


@asynccontextmanager
async def scripted_server(
    model_dir: Path, script: Scripts, *, ends: bool = True, **settings: Any
) -> AsyncIterator[Running]:
    """The HTTP app over such an engine, on a free port; `settings` may hold a `server` section."""
    config = _config(model_dir, settings)
    with await asyncio.to_thread(Engine, config, partial(_connect, script, ends)) as engine:
        service = Service(engine.config)
        service.ready(engine)
        runner = create_runner(create_app(service), shutdown_timeout_s=1.0)
        await runner.setup()
        try:
            await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
                url = f"http://127.0.0.1:{runner.addresses[0][1]}"
                yield Running(url, engine, service, session)
        finally:
            await runner.cleanup()


def _config(model_dir: Path, settings: Mapping[str, Any]) -> EngineConfig:
    base = {"engine_process": "off", "threads": 1, "max_num_seqs": 8, "num_gpu_blocks_override": 513, "block_size": 16}
    return config_from({"model": str(model_dir), "debug_checks": True, **base, **settings})


def _connect(script: Scripts, ends: bool, *args: Any) -> Any:
    """A core in a thread of this process, with the scripted model for its layers."""

    def load(path: Path, config: ModelConfig, **_: Any) -> ScriptedDecoder:
        return ScriptedDecoder(config, Tokenizer.from_dir(path), script, ends)

    with patch.object(build, "load_model", load), patch.object(build, "ModelRunner", ScriptedRunner):
        return ThreadClient(*args)


class ScriptedRunner(ModelRunner):
    """The real runner; it shows its model the plan, because a decoder alone does not know which request a row has."""

    def launch(self, plan: StepPlan) -> Any:
        self._model.read(plan)
        return super().launch(plan)


class ScriptedDecoder(nn.Module):
    """The part of a Decoder that the runner needs. Hidden states `[T, 1]` are the next tokens, for `logits`."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, scripts: Scripts, ends: bool) -> None:
        super().__init__()
        self.config, self.dtype, self.device = config, torch.float32, torch.device("cpu")
        self._tokenizer, self._scripts, self._ends = tokenizer, scripts, ends
        self._plan: StepPlan | None = None
        self._prompts: dict[RequestId, tuple[int, ...]] = {}
        self._encoded: dict[tuple[int, ...], list[int]] = {}  # scripts by prompt

    def read(self, plan: StepPlan) -> None:
        """Take the plan of the step that comes next."""
        self._plan = plan
        for entry in plan.entered:
            self._prompts[entry.req] = entry.token_ids[: entry.num_prompt_tokens]

    def forward(self, input_ids: Tensor, positions: Tensor, attention: object) -> Tensor:
        plan = self._plan
        assert plan is not None
        if plan.step < 0:  # calibration
            return torch.zeros(len(input_ids), 1)
        following = [token for seq in plan.seqs for token in self._following(seq)]
        assert len(following) == len(input_ids)
        return torch.tensor(following, dtype=torch.float32)[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 `[N, vocab]`: smaller ids come before larger ones, and the script's token is before all of them."""
        others = torch.arange(self.config.vocab_size, dtype=torch.float32).mul(-1e-3).repeat(len(hidden), 1)
        return others.scatter_(1, hidden.long(), LEAD)

    def _following(self, seq: SeqStep) -> list[int]:
        """The tokens after each of a sequence's positions in this step: the prompt's own, then the script's."""
        prompt = self._prompts[seq.req]
        if prompt not in self._encoded:
            self._encoded[prompt] = self._encode(self._script_of(prompt))
        script = self._encoded[prompt]
        end = self.config.eos_token_ids[0] if self._ends else None
        following = []
        for position in range(seq.start + 1, seq.start + seq.n + 1):
            place = position - len(prompt)
            if place < 0:
                following.append(prompt[position])
            elif place < len(script) or end is None:
                following.append(script[place % len(script)])
            else:
                following.append(end)
        return following

    def _script_of(self, prompt: Sequence[int]) -> Script:
        if callable(self._scripts):
            return self._scripts(prompt)
        if not isinstance(self._scripts, Mapping):
            return self._scripts
        text = self._tokenizer.decode(prompt, skip_special_tokens=False)
        for key, script in self._scripts.items():
            if key in text:
                return script
        raise LookupError(f"no script for the prompt {text!r}")

    def _encode(self, script: Script) -> list[int]:
        pieces = [script] if isinstance(script, str) else script
        ids: list[int] = []
        for piece in pieces:
            ids += [piece] if isinstance(piece, int) else self._tokenizer.encode(piece, add_special_tokens=False)
        return ids
