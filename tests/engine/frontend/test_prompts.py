"""What may be given as prompts, and what each means."""

from __future__ import annotations

import array

import numpy as np
import pytest
import torch

from tfserve.engine.frontend.prompts import as_batch, as_prompt
from tfserve.errors import RequestError

IDS = [5, 6, 7]


class Token(int):
    """An integer that no message to another process can hold."""


@pytest.mark.parametrize(
    ("prompts", "batch"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        (("a", IDS), ["a", IDS]),
        (np.array(["a", "b"]), ["a", "b"]),
        ((text for text in "ab"), ["a", "b"]),
        ([], []),
        ([[]], [[]]),
        (IDS, [IDS]),
        (tuple(IDS), [IDS]),
        (range(5, 8), [IDS]),
        (iter(IDS), [IDS]),
        (array.array("i", IDS), [IDS]),
        (np.array(IDS), [IDS]),
        (torch.tensor(IDS), [IDS]),
        ([np.int64(5), 6, np.uint8(7)], [IDS]),
        (list(torch.tensor(IDS)), [IDS]),
        ([IDS, IDS], [IDS, IDS]),
        (np.array([IDS, IDS]), [IDS, IDS]),
        (torch.tensor([IDS, IDS]), [IDS, IDS]),
        ([np.array(IDS), torch.tensor(IDS), iter(IDS), "a"], [IDS, IDS, IDS, "a"]),
        ([torch.tensor([5]), torch.tensor([6])], [[5], [6]]),
        (list(map(Token, IDS)), [IDS]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_text_and_ids_of_every_make_are_told_apart(prompts, batch):
    made = as_batch(prompts)
    assert made == batch
    assert all(type(token) is int for prompt in made if not isinstance(prompt, str) for token in prompt)


@pytest.mark.parametrize(
    "prompts",
    [
        *(None, 5, 1.5, np.int64(5), torch.tensor(5), object(), {"prompt": "a"}, {"a", "b"}),
        *(b"abc", bytearray(b"abc"), memoryview(b"a"), [None], ["a", 5], ["a", b"b"], [{"prompt": "a"}], [IDS, None]),
        *(torch.eye(2).to_sparse(), torch.empty(2, device="meta"), [torch.eye(2).to_sparse()]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_prompt_is_refused_by_the_arguments_name(prompts):
    with pytest.raises(RequestError, match=r"^prompts(\[\d\])? must be text") as caught:
        as_batch(prompts)
    assert caught.value.param == "prompts"


@pytest.mark.parametrize("prompt", [None, 5, b"abc", {"prompt": "a"}, {5}])
def test_a_single_prompt_is_text_or_ids(prompt):
    assert as_prompt("a") == "a"
    assert as_prompt(np.array(IDS)) == IDS
    with pytest.raises(RequestError, match=r"^prompt must be text or token ids") as caught:
        as_prompt(prompt)
    assert caught.value.param == "prompt"


def test_the_callers_list_stays_the_callers():
    ids = [5, 6]
    made = as_prompt(ids)
    ids.append(7)
    assert made == [5, 6]
