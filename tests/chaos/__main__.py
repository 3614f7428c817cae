"""`python -m tests.chaos --minutes 10 --seed 1`: prints the counts as JSON; exit code 1 for a broken promise."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.chaos.run import run
from tests.chaos.test_chaos import broken_promises
from tests.conftest import TINY, save_random
from tests.tokenizers import write_tiny_tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work_dir = Path(name)
        model_dir = work_dir / "model"
        save_random(Qwen2ForCausalLM, Qwen2Config(**TINY, max_position_embeddings=1024), model_dir)
        write_tiny_tokenizer(model_dir)
        result = asyncio.run(run(model_dir, work_dir, args.minutes * 60, args.seed))
    print(json.dumps(result, indent=2))
    broken = broken_promises(result)
    print("\n".join(broken) or "every promise was kept")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
