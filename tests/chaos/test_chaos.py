"""With clients of every kind, every stream ends correctly, every block is freed, and the server ends on SIGTERM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.chaos.run import run
from tests.chaos.visitors import PHASES
from tests.tokenizers import write_tiny_tokenizer


def broken_promises(result: dict[str, Any]) -> list[str]:
    """The violations in a run."""
    broken = [*result["broken"], *result["log_errors"]]
    if result["exit_code"] != 0:
        broken.append(f"exit code {result['exit_code']}")
    if result["engine_left"]:
        broken.append("the engine outlived its server")
    return broken


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_minute_of_chaos(tiny_qwen25: Path, tmp_path: Path) -> None:
    result = await run(write_tiny_tokenizer(tiny_qwen25), tmp_path, seconds=60, seed=1)
    print(result)
    assert broken_promises(result) == []
    # The run was varied: clients left, and were aborted, in every state of a stream.
    outcomes = result["outcomes"]
    for phase in PHASES:
        assert outcomes.get(f"leaves_in_a_phase: left while {phase}"), phase
        assert outcomes.get(f"is_aborted_in_a_phase: aborted while {phase}"), phase
    assert result["books"][-1]["num_preemptions"] > 100
    assert any(outcome.endswith(("draining", "error aborted")) for outcome in outcomes)
