"""Random actions in any order: every step reads what was written, no block is lost, every request can resume."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.memory.fakes import FakeTiers
from tfserve.memory.residency import PAUSED, KVState
from tfserve.plan import Direction

DEVICE_BLOCKS = 9
MAX_TOKENS = 25
MAX_LIVE = 5


class Scene:
    """Requests arrive, run, pause, come back and leave; copies end late, badly, and in either direction first.

    Every number given picks something that is possible just then, so that any sequence of actions makes sense.
    """

    def __init__(self, **options) -> None:
        self.tiers = FakeTiers(num_blocks=DEVICE_BLOCKS, block_size=4, **options)
        self.live: list[str] = []
        self.num_arrived = 0

    def among(self, pick: int, *states: KVState) -> str | None:
        able = [req for req in self.live if self.tiers.state(req) in states]
        return able[pick % len(able)] if able else None

    def arrive(self, n: int) -> None:
        if len(self.live) < MAX_LIVE:
            req = str(self.num_arrived)
            self.num_arrived += 1
            self.live.append(req)
            self.tiers.step({req: n})

    def step(self, n: int, pick: int, budget: int) -> None:
        """All requests on the device but one continue; one without any KV is computed again."""
        left_out = self.live[pick % len(self.live)] if self.live else None
        chosen = [
            req
            for req in self.live
            if self.tiers.state(req) in (KVState.DEVICE, KVState.NONE)
            and req != left_out
            and self.tiers.kv.view(req).num_tokens < MAX_TOKENS
        ]
        order = self.live[pick % MAX_LIVE :] + self.live[: pick % MAX_LIVE]
        self.tiers.step(dict.fromkeys(chosen, n), order, budget)

    def preempt(self, pick: int) -> None:
        req = self.among(pick, KVState.DEVICE, KVState.PARTIAL, KVState.LOADING)
        before = self.tiers.kv.num_free_blocks + self.tiers.kv.num_storing_blocks
        if req is not None:
            self.tiers.preempt(req)
        assert self.tiers.kv.num_free_blocks + self.tiers.kv.num_storing_blocks >= before

    def resume(self, pick: int, max_blocks: int) -> None:
        req = self.among(pick, *PAUSED, KVState.PARTIAL)
        if req is not None:
            assert len(self.tiers.resume(req, max_blocks)) <= max_blocks

    def swap(self, pick: int) -> None:
        """One leaves and another comes, in the same step."""
        comes, leaves = self.among(pick, *PAUSED), self.among(pick, KVState.DEVICE)
        if comes is not None and leaves is not None:
            self.tiers.preempt(leaves)
            self.tiers.resume(comes)

    def leave(self, pick: int) -> None:
        if len(self.live) > 2:
            req = self.live.pop(pick % len(self.live))
            self.tiers.kv.release(req)
            assert self.tiers.state(req) is KVState.NONE
            self.tiers.table.remove(req)

    def transfer(self, direction: Direction, moves: int, acks: int) -> None:
        for _ in range(moves):
            self.tiers.device.move(direction)
        for _ in range(acks):
            self.tiers.ack(direction)

    def fail(self, direction: Direction) -> None:
        self.tiers.device.move(direction, ok=False)

    def cancel(self) -> None:
        self.tiers.cancel()

    def check(self) -> None:
        self.tiers.kv.check()
        assert self.tiers.wrong == []
        self.check_columns()

    def check_columns(self) -> None:
        """The table's rows move when a request leaves; each is that of its request all the same."""
        table = self.tiers.table
        table.check()
        assert sorted(table.ids) == sorted(self.live)
        views = [self.tiers.kv.view(req) for req in table.ids]
        assert table["num_computed"].tolist() == [view.num_tokens for view in views]
        assert table["host_tokens"].tolist() == [view.num_host_tokens for view in views]
        assert table["device_blocks"].tolist() == [view.num_device_blocks for view in views]

    def end(self) -> None:
        """From any state: all pause, then one after the other comes back whole; then all leave nothing behind."""
        tiers = self.tiers
        tiers.drain()
        for req in self.live:
            if tiers.state(req) not in PAUSED:
                tiers.preempt(req)
            self.check()
        tiers.drain()
        for req in self.live:
            while tiers.state(req) not in (KVState.NONE, KVState.DEVICE):
                before = tiers.kv.view(req).num_device_blocks
                tiers.resume(req)
                assert tiers.kv.view(req).num_device_blocks > before or tiers.state(req) is KVState.DEVICE
                tiers.drain()
            assert tiers.intact(req)
            tiers.preempt(req)
            tiers.drain()
            self.check()
        for req in self.live:
            tiers.kv.release(req)
        tiers.drain()
        self.check()
        assert tiers.all_free()


OPTIONS = {
    "num_host_blocks": [60, 12, 6, 0],
    "depth": [2, 1],
    "store_chunk_tokens": [2, 4],
    "write_through": [True, False],
    "load_evict_overlap": [True, False],
}
directions = st.sampled_from(list(Direction))
picks = st.integers(0, 59)


class SceneMachine(RuleBasedStateMachine):
    """Hypothesis draws the actions, and reduces them when they fail."""

    @initialize(options=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OPTIONS.items()}))
    def start(self, options):
        self.scene = Scene(**options)

    @rule(n=st.integers(3, 14))
    def arrive(self, n):
        self.scene.arrive(n)

    @rule(n=st.sampled_from([1, 2, 5]), pick=picks, budget=st.sampled_from([40, 5, 0]))
    def step(self, n, pick, budget):
        self.scene.step(n, pick, budget)

    @rule(pick=picks)
    def preempt(self, pick):
        self.scene.preempt(pick)

    @rule(pick=picks, max_blocks=st.sampled_from([9, 3, 1]))
    def resume(self, pick, max_blocks):
        self.scene.resume(pick, max_blocks)

    @rule(pick=picks)
    def swap(self, pick):
        self.scene.swap(pick)

    @rule(pick=picks)
    def leave(self, pick):
        self.scene.leave(pick)

    @rule(direction=directions, moves=st.integers(0, 6), acks=st.integers(0, 6))
    def transfer(self, direction, moves, acks):
        self.scene.transfer(direction, moves, acks)

    @rule(direction=directions)
    def fail(self, direction):
        self.scene.fail(direction)

    @rule()
    def cancel(self):
        self.scene.cancel()

    @invariant()
    def all_is_well(self):
        if hasattr(self, "scene"):
            self.scene.check()

    def teardown(self):
        if hasattr(self, "scene"):
            self.scene.end()


TestSceneMachine = SceneMachine.TestCase
TestSceneMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("seed", range(40))
def test_long_random_lives_stay_whole(seed):
    """Hypothesis prefers short and repetitive lives; the rare orders of events need long ones of plain chance."""
    rng = random.Random(seed)
    for _ in range(3):
        scene = Scene(**{name: rng.choice(values) for name, values in OPTIONS.items()})
        failures = rng.choice([0, 0.3, 2])
        for _ in range(100):
            act_by_chance(scene, rng, failures)
            scene.check()
        scene.end()


def act_by_chance(scene: Scene, rng: random.Random, failures: float) -> None:
    pick, direction = rng.randrange(60), rng.choice(list(Direction))
    actions = {
        (scene.arrive, rng.randint(3, 14)): 2,
        (scene.step, rng.choice([1, 2, 5]), pick, rng.choice([40, 5, 0])): 4,
        (scene.preempt, pick): 2,
        (scene.resume, pick, rng.choice([9, 3, 1])): 3,
        (scene.swap, pick): 3,
        (scene.leave, pick): 1,
        (scene.transfer, direction, rng.randint(0, 6), rng.randint(0, 6)): 6,
        (scene.fail, direction): failures,
        (scene.cancel,): 1,
    }
    action, *arguments = rng.choices(list(actions), list(actions.values()))[0]
    action(*arguments)
