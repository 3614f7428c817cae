"""What a benchmark sends and when: arrival times and prompts, both functions of a seed."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import msgspec

from tfserve.errors import TfserveError

# Plain English words, each one token after a space in the common BPE vocabularies, so that a prompt's length in tokens
# follows its length in words exactly once the template's share is known.
_WORD_LIST = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea body information back parent face others
level office door health person art war history party result change morning reason research girl guy moment air teacher
"""
WORDS = tuple(_WORD_LIST.split())


def parse_rate(text: str) -> float:
    """Requests per second from "2.5", or infinity from "inf" or "burst". Raises ValueError for anything else."""
    rate = math.inf if text in {"inf", "burst"} else float(text)
    if not rate > 0:
        raise ValueError(f"a rate must be above 0, got {text}")
    return rate


def arrival_times(rate: float, count: int, seed: int) -> list[float]:
    """When each of `count` requests arrives, in seconds: a Poisson process from 0, or all at 0 for an infinite rate."""
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(seed)
    gaps = (rng.expovariate(rate) for _ in range(count - 1))
    return list(itertools.accumulate(gaps, initial=0.0))


def random_prompt(num_words: int, rng: random.Random) -> str:
    """Text of exactly `num_words` random common words: no prefix cache helps with the next one."""
    return " ".join(rng.choices(WORDS, k=num_words))


def read_prompts(path: Path, count: int, seed: int) -> list[str]:
    """`count` prompts drawn from a JSON-lines file with a "prompt" field, each row once before any row twice.

    Raises TfserveError naming the line that is not such a row.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TfserveError(f"--dataset: cannot read {path}: {error.strerror}; give a .jsonl file or random") from None
    prompts = [_prompt_of(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise TfserveError(f"--dataset: {path} holds no rows; give a file with one JSON object a line")
    random.Random(seed).shuffle(prompts)
    return list(itertools.islice(itertools.cycle(prompts), count))


def _prompt_of(line: bytes, where: str) -> str:
    try:
        prompt = msgspec.json.decode(line)["prompt"]
    except (msgspec.DecodeError, LookupError, TypeError):
        prompt = None
    if not isinstance(prompt, str) or not prompt:
        raise TfserveError(f'--dataset: {where} must be a JSON object with a non-empty text "prompt"')
    return prompt


class PromptSize(msgspec.Struct, frozen=True):
    """How the server counts prompts of random words: `fixed` tokens of template and `per_word` for each word."""

    fixed: float
    per_word: float

    @classmethod
    def from_two(cls, small: tuple[int, int], large: tuple[int, int]) -> PromptSize:
        """From two measured (words, prompt tokens). Raises TfserveError if more words did not make more tokens."""
        per_word = (large[1] - small[1]) / (large[0] - small[0])
        if per_word <= 0:
            raise TfserveError(
                f"the server counted {small[1]} tokens for {small[0]} words but {large[1]} for {large[0]}: "
                "it cuts prompts or miscounts; use --dataset FILE"
            )
        return cls(fixed=small[1] - per_word * small[0], per_word=per_word)

    def words_for(self, num_tokens: int) -> int:
        """Words whose prompt has about `num_tokens` tokens. Raises TfserveError if the template alone has more."""
        words = round((num_tokens - self.fixed) / self.per_word)
        if words < 1:
            raise TfserveError(
                f"--input-len {num_tokens}: the server adds {self.fixed:.0f} tokens of its own to every prompt; "
                "ask for more, or use --endpoint completions"
            )
        return words
