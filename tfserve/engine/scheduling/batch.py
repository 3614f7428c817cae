"""BatchBuilder: which running requests compute how many tokens in the coming step. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from tfserve.engine.scheduling.cost_model import StepSample
from tfserve.engine.scheduling.policy import Decision
from tfserve.engine.scheduling.request import Request
from tfserve.memory.kv_manager import KVCacheManager
from tfserve.plan import SeqStep
from tfserve.types import RequestId


class BatchBuilder:
    """Spends a step's token budget and finds blocks for what it spends it on."""

    def __init__(self, kv: KVCacheManager, max_num_batched_tokens: int) -> None:
        self._kv = kv
        self._max_num_batched_tokens = max_num_batched_tokens

    def build(
        self, running: Mapping[RequestId, Request], decision: Decision, held: Collection[RequestId]
    ) -> tuple[list[SeqStep], int]:
        """The step's shares and how many of them, in front, are decodes.

        Decodes come first, without those in `held`; then prompts as `decision.order` says, then in order of admission.
        """
        decoding: list[Request] = []
        unsorted: dict[RequestId, Request] = {}
        for req, request in running.items():
            if request.is_decoding:
                decoding.append(request)
            else:
                unsorted[req] = request
        prompts = [unsorted.pop(req) for req in decision.order if req in unsorted] + list(unsorted.values())
        decodes: list[SeqStep] = []
        if decision.decode or not prompts:
            self._add_decodes(decodes, decoding, held)
        budget = self._max_num_batched_tokens - len(decodes)
        # None at all lets decodes go first; where none can run there is no reason to wait.
        if decision.prefill_tokens is not None and (decodes or decision.prefill_tokens > 0):
            budget = min(budget, decision.prefill_tokens)
        chunks: list[SeqStep] = []
        most = dict(zip(decision.order, decision.chunks, strict=False))
        for request in prompts:
            n = min(request.num_tokens - request.num_computed_tokens, budget, most.get(request.id, budget))
            if n > 0 and self._append(chunks, request, n):
                budget -= n
        if not chunks and not decodes:
            # The prompts have no room yet: that is no reason for the others to wait.
            self._add_decodes(decodes, decoding, held)
        return decodes + chunks, len(decodes)

    def _add_decodes(self, decodes: list[SeqStep], decoding: Sequence[Request], held: Collection[RequestId]) -> None:
        for request in decoding:
            if len(decodes) == self._max_num_batched_tokens:
                break
            # A last token in flight is the last one, whatever it is.
            if request.id not in held and not request.is_complete:
                self._append(decodes, request, 1)

    def _append(self, seqs: list[SeqStep], request: Request, n: int) -> bool:
        """Plan n tokens of a request if there are blocks for them; a request without waits for the next step.

        From then on they count as computed.
        """
        start = request.num_computed_tokens
        new_blocks = self._kv.extend(request.id, n, request.num_prompt_tokens + request.max_tokens)
        if new_blocks is None or request.slot is None:
            return False
        tokens = None if request.device_has_token else tuple(request.token_ids[start : start + n])
        seqs.append(SeqStep(request.id, request.slot, start, n, request.plan(), tokens, new_blocks))
        return True


def sample_of(seqs: Sequence[SeqStep], n_decode: int, seconds: float) -> StepSample:
    """A step as the CostModel sees it."""
    decodes, chunks = seqs[:n_decode], seqs[n_decode:]
    return StepSample(
        n_decode,
        float(sum(seq.start + 1 for seq in decodes)),
        sum(seq.n for seq in chunks),
        float(sum(seq.n * (seq.start + seq.n / 2) for seq in chunks)),
        seconds,
    )
