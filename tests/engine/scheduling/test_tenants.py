"""Tenants share the device by weight, under every policy; one tenant alone is served as if there were no tenants."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.scene import Scene
from tests.engine.simulation.test_sim_core import SimEngine
from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.policies import POLICIES as REGISTERED
from tfserve.engine.scheduling.policies import make_policy
from tfserve.engine.scheduling.policies.tenants import Tenants
from tfserve.engine.scheduling.policy import Decision, Snapshot
from tfserve.engine.scheduling.tenant_numbers import TenantNumbers
from tfserve.messages import AddRequest, StepOutputs
from tfserve.types import SamplingParams, Tenant

POLICIES = sorted(REGISTERED)
HONEST, OTHER = Tenant("honest"), Tenant("other")


class Shared(SimEngine):
    """A simulated engine with tenants; notes when each token came and what each step computed."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.came_s: dict[str, list[float]] = {}
        self.plans: list = []
        launch = self.core._runner.launch

        def note(plan):
            self.plans.append(plan)
            return launch(plan)

        self.core._runner.launch = note

    def ask(self, at_s: float, req: str, prompt: int, output: int, rate=6.0, tenant=OTHER, priority=0) -> None:
        params = SamplingParams(max_tokens=output)
        message = AddRequest(req, [1] * prompt, params, at_s, rate, priority, tenant=tenant)
        self.clock.call_at(at_s, lambda: self.core.inbox.put(message))

    def _emit(self, message: StepOutputs) -> None:
        for output in message.outputs:
            self.came_s.setdefault(output.request_id, []).extend([self.clock.now()] * len(output.token_ids))

    def run_until(self, end_s: float) -> Shared:
        self.clock.call_at(end_s, lambda: None)
        while self.clock.now() < end_s:
            if not self.core.step():
                if self.clock.next_event_s is None:
                    break
                self.core.sleep()
        return self

    def ttft(self, req: str, at_s: float) -> float:
        return self.came_s[req][0] - at_s if self.came_s.get(req) else math.inf


def engine(policy: str, **more) -> Shared:
    settings = {"num_blocks": 120, "num_host_blocks": 600, "max_num_seqs": 8} | more
    return Shared(policy=policy, **settings)


def honest_firsts(shared: Shared, starts=(0.5, 0.9, 1.3)) -> list[float]:
    """First tokens of three honest requests, in seconds after they came."""
    for index, at_s in enumerate(starts):
        shared.ask(at_s, f"h{index}", 40, 30, tenant=HONEST)
    shared.run_until(2.5)
    return [shared.ttft(f"h{index}", at_s) for index, at_s in enumerate(starts)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rate", [6.0, 1e6, 0.01, None])
def test_many_requests_of_one_tenant_do_not_hold_anothers_first_token(policy, rate):
    shared = engine(policy)
    for index in range(150):
        shared.ask(0.0, f"a{index}", 40, 200, rate=rate)
    assert max(honest_firsts(shared)) < 0.5


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_of_a_tenant_that_holds_little_is_computed_at_once_and_alone(policy):
    shared = engine(policy)
    for index in range(6):
        shared.ask(0.0, f"o{index}", 60, 200, rate=1000.0)
    shared.ask(0.6, "h0", 50, 30, tenant=HONEST)
    shared.run_until(1.2)
    begun = next(plan for plan in shared.plans if any(seq.req == "h0" for seq in plan.seqs))
    assert [(seq.req, seq.n) for seq in begun.seqs] == [("h0", 50)]
    assert shared.came_s["o0"], "the others had begun"


@pytest.mark.parametrize("policy", POLICIES)
def test_long_prompts_of_one_tenant_do_not_hold_anothers_first_token(policy):
    shared = engine(policy, num_blocks=4200, num_host_blocks=8000)
    for index in range(32):
        shared.ask(0.0, f"a{index}", 8000, 30, rate=None)
    assert max(honest_firsts(shared)) < 0.5


@pytest.mark.parametrize("overload", ["queue", "share", "shed"])
def test_readers_beyond_the_capacity_are_those_of_the_tenant_that_has_more(overload):
    shared = engine("tokenflow", overload=overload)
    for index in range(60):
        shared.ask(index / 50, f"a{index}", 40, 200, rate=50.0)
    assert max(honest_firsts(shared)) < 0.5
    times = [np.array(shared.came_s[f"h{index}"]) for index in range(3)]
    for came_s in times:
        read_s = came_s[0] + np.arange(len(came_s)) / 6.0
        assert len(came_s) == 30
        assert (came_s - read_s).max() < 0.5


@pytest.mark.parametrize("policy", ["tokenflow", "fcfs", "fcfs-chunked", "round-robin"])
def test_a_batch_too_wide_to_read_along_does_not_stall_a_tenant_that_holds_little(policy):
    shared = engine(policy, max_num_seqs=32, num_blocks=600)
    # A step of 32 takes longer than a reader needs for a token.
    shared.core._runner._step_s = lambda n, _, prompt, __: 0.010 + 0.005 * n + 0.0008 * prompt
    for index in range(100):
        shared.ask(0.0, f"a{index}", 40, 200)
    for index in range(3):
        shared.ask(2.0 * index + 2.0, f"h{index}", 40, 30, tenant=HONEST)
    shared.run_until(11.0)
    for index in range(3):
        came_s = np.array(shared.came_s[f"h{index}"])
        assert len(came_s) == 30
        assert (came_s - (came_s[0] + np.arange(30) / 6.0)).max() < 0.05
    # The others have nearly all of the time, since three readers need little.
    assert sum(len(came_s) for req, came_s in shared.came_s.items() if req[0] == "a") > 1000


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_short_is_shared_by_weight(policy):
    shared = engine(policy, max_num_seqs=8)
    heavy, light = Tenant("heavy", 3.0), Tenant("light", 1.0)
    for index in range(60):
        shared.ask(0.0, f"h{index}", 20, 40, rate=None, tenant=heavy)
        shared.ask(0.0, f"l{index}", 20, 40, rate=None, tenant=light)
    shared.run_until(4.0)
    made = Counter({"h": 0, "l": 0})
    for req, came_s in shared.came_s.items():
        made[req[0]] += len(came_s)
    assert made["l"] > 0
    assert 2.5 < made["h"] / made["l"] < 3.5


@pytest.mark.parametrize("policy", POLICIES)
def test_one_tenant_gets_the_schedule_that_it_gets_without_tenants(policy):
    def plans(tenants: list[Tenant]):
        shared = engine(policy)
        for index in range(60):
            rate = (6.0, 20.0, None)[index % 3]
            tenant = tenants[index % len(tenants)]
            shared.ask(index / 25, f"a{index}", 30 + index, 50, rate=rate, tenant=tenant)
        return shared.run_until(5.0).plans

    assert plans([Tenant()]) == plans([OTHER])
    assert len(plans([OTHER])) > 100


class Seen:
    """A policy that remembers what it was shown."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []

    def decide(self, snapshot: Snapshot) -> Decision:
        self.snapshots.append(snapshot)
        return Decision()


def test_while_one_tenant_has_requests_the_policy_sees_the_snapshot_itself():
    policy, snapshot = Seen(), Scene().waiting("a").running("b").snapshot()
    Tenants(SchedulerConfig()).decide(policy, snapshot)
    assert policy.snapshots[0] is snapshot


def test_many_tenants_with_a_request_each_are_left_to_the_policy():
    scene = Scene(num_blocks=60, max_num_seqs=4)
    for index in range(4):
        scene.running(f"r{index}", tenant=Tenant(f"r{index}"))
    for index in range(30):
        scene.waiting(f"w{index}", tenant=Tenant(f"w{index}"), for_s=5 - index / 10)
    snapshot = scene.snapshot()
    for policy in POLICIES:
        config = SchedulerConfig(policy=policy, watermark=0.0)
        alone, shared = make_policy(config).decide(snapshot), Tenants(config).decide(make_policy(config), snapshot)
        assert (shared.admit, shared.preempt, shared.resume) == (alone.admit, alone.preempt, alone.resume)


def test_priorities_count_within_a_tenant_only():
    scene = Scene(now_s=100.0)
    scene.waiting("first", rate=None, priority=-(2**63), tenant=OTHER, for_s=3)
    scene.waiting("second", rate=None, priority=2**63 - 1, tenant=OTHER, for_s=2)
    scene.waiting("mine", rate=None, priority=9, tenant=HONEST, for_s=1)
    policy = Seen()
    Tenants(SchedulerConfig()).decide(policy, scene.snapshot())
    c = policy.snapshots[0].columns
    assert {req: int(c.priority[row]) for row, req in enumerate(c.ids)} == {"first": 0, "second": 1, "mine": 0}
    # In turn, and none earlier than it came.
    turn = sorted(c.ids, key=lambda req: int(c.seq[c.ids.index(req)]))
    assert turn == ["first", "mine", "second"]
    assert [float(c.arrival_s[c.ids.index(req)]) for req in turn] == [97.0, 99.0, 99.0]


def test_prompts_of_two_tenants_share_a_step():
    scene = Scene(num_blocks=2000).prefilling("long", prompt=8000, tenant=OTHER)
    scene.prefilling("short", prompt=100, tenant=HONEST)
    decision = Tenants(SchedulerConfig()).decide(Seen(), scene.snapshot())
    assert dict(zip(decision.order, decision.chunks, strict=True)) == {"long": 100, "short": 100}


def test_a_tenants_prompts_do_not_keep_another_from_decoding():
    scene = Scene(num_blocks=2000).prefilling("long", prompt=8000, tenant=OTHER).running("mine", tenant=HONEST)
    config = SchedulerConfig(policy="fcfs")
    assert not make_policy(config).decide(scene.snapshot()).decode
    assert Tenants(config).decide(make_policy(config), scene.snapshot()).decode


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans())))
def test_tenants_are_numbered_from_zero(events):
    numbers, live = TenantNumbers(), Counter()
    known: dict[str, int] = {}
    for name, comes in events:
        if comes:
            known[name] = numbers.enter(name)
            live[name] += 1
        elif live[name]:
            numbers.leave(known[name])
            live[name] -= 1
        alive = [name for name in live if live[name]]
        assert len(numbers) == len(alive)
        assert len({known[name] for name in alive}) == len(alive)
        assert all(0 <= known[name] < 5 for name in alive)
