import functools

import numpy as np
import pytest
from mini_cluster import group_of, hash_answer, hash_instance

from memserve.cluster.emulated import EmulatedCluster
from memserve.cluster.emulated_node import Node
from memserve.cluster.step_time import Measured, Modelled
from memserve.kvcache import InVirtualTime
from memserve.request import Role
from memserve.sampling_params import SamplingParams
from memserve.sched.cost_model.fixed import FixedCostModel
from memserve.sched.global_scheduler import GlobalScheduler
from memserve.sched.routing import LeastLoad, RoundRobin
from memserve.workload.player import SessionPlayer
from memserve.workload.session import Session, Turn

COSTS = FixedCostModel(step_s=0.01, prefill_token_s=0.0001, decode_token_s=0.0005)


def make_sessions(count=20, seed=0, think_s=0.3):
    rng = np.random.default_rng(seed)
    system = rng.integers(0, 1000, 25)
    sessions = []
    for i in range(count):
        turns = []
        for k in range(int(rng.integers(1, 5))):
            tokens = rng.integers(0, 1000, int(rng.integers(1, 40)))
            tokens = np.concatenate([system, tokens]) if k == 0 and i % 2 else tokens
            params = SamplingParams(max_tokens=int(rng.integers(1, 60)), ignore_eos=True)
            turns.append(Turn(tokens.astype(np.int32), params, int(think_s * 1e9) if k else 0))
        arrival_ns = int(rng.exponential(0.2) * 1e9)
        sessions.append(Session(f"s{i}", arrival_ns, tuple(turns), np.array([7], dtype=np.int32)))
    return sessions


def run(sessions, macro_steps, instances=2, policy=None, step_time=None, concurrency=None, **options):
    nodes = []
    for i in range(instances):
        instance = hash_instance(**{"block_size": 4, "num_blocks": 400, "max_running": 8, **options})
        instance.label = f"colocated-{i}"
        nodes.append(Node(instance))
    scheduler = GlobalScheduler(
        group_of([n.instance.label for n in nodes], policy or LeastLoad()), np.random.default_rng(3)
    )
    player = SessionPlayer(sessions, 4000, concurrency)
    cluster = EmulatedCluster(nodes, scheduler, player, step_time or Modelled({Role.COLOCATED: COSTS}), macro_steps)
    num_events = 0
    while cluster.advance():
        num_events += 1
    for node in nodes:
        node.instance.check()
    return scheduler.timelines, nodes, num_events


def as_rows(timelines):
    return [
        (t.request_id, t.instance, t.arrival_ns, t.dispatched_ns, t.finished_ns, t.token_ids.tolist(),
         t.token_times_ns.tolist(), t.stats, t.reason)
        for t in timelines.values()
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"num_blocks": 70}, {"index": "none", "num_blocks": 70}, {"chunk_size": 8}])
@pytest.mark.parametrize("concurrency", [None, 5])
def test_macro_steps_change_nothing_but_the_number_of_events(options, concurrency):
    single, single_nodes, many = run(make_sessions(), False, concurrency=concurrency, **options)
    macro, macro_nodes, few = run(make_sessions(), True, concurrency=concurrency, **options)
    assert as_rows(macro) == as_rows(single)
    for a, b in zip(single_nodes, macro_nodes, strict=True):
        assert a.busy_ns == b.busy_ns and a.instance.scheduler.counts == b.instance.scheduler.counts
        assert a.instance.pool.stats() == b.instance.pool.stats()
    assert few < many * 2 / 3
    if "num_blocks" in options:
        assert sum(n.instance.scheduler.counts.preemptions + n.instance.pool.stats().num_evicted for n in macro_nodes)


@pytest.mark.parametrize("swap_ahead_blocks", [0, 12])
def test_macro_steps_change_nothing_where_blocks_are_copied_beside_compute(swap_ahead_blocks):
    slow = functools.partial(InVirtualTime, seconds_for=lambda num_blocks: 0.003 * num_blocks)
    options = {"num_blocks": 70, "num_dram_blocks": 90, "engine": slow, "swap_ahead_blocks": swap_ahead_blocks}
    single, single_nodes, _ = run(make_sessions(), False, **options)
    macro, macro_nodes, _ = run(make_sessions(), True, **options)
    assert as_rows(macro) == as_rows(single)
    assert [n.instance.pool.stats() for n in macro_nodes] == [n.instance.pool.stats() for n in single_nodes]
    assert sum(n.instance.pool.stats().num_swapped_in for n in macro_nodes)


def test_every_answer_is_right_and_every_turn_is_played():
    sessions = make_sessions()
    timelines, _, _ = run(sessions, True)
    assert len(timelines) == sum(len(s.turns) for s in sessions)
    prompt = output = None
    for session in sessions:
        for k, turn in enumerate(session.turns):
            timeline = timelines[f"{session.session_id}/{k}"]
            prompt = turn.tokens if k == 0 else session.next_prompt(prompt, output, k)
            output = timeline.token_ids
            assert timeline.reason == "length" and output.tolist() == hash_answer(prompt, turn.params.max_tokens)


def test_virtual_time_is_what_the_cost_model_says():
    turn = Turn(np.arange(10, dtype=np.int32), SamplingParams(max_tokens=3, ignore_eos=True))
    session = Session("a", 1_000_000_000, (turn,), np.empty(0, dtype=np.int32))
    for macro_steps in (False, True):
        timelines, [node], _ = run([session], macro_steps, instances=1)
        t = timelines["a/0"]
        assert t.token_times_ns.tolist() == [1_011_000_000, 1_021_500_000, 1_032_000_000]
        assert t.finished_ns == 1_032_000_000 and node.busy_ns == 32_000_000
        assert (t.arrival_ns, t.dispatched_ns, t.stats.queued_ns, t.stats.first_scheduled_ns) == (1_000_000_000,) * 4


def test_instances_work_at_the_same_virtual_time():
    turn = Turn(np.arange(10, dtype=np.int32), SamplingParams(max_tokens=3, ignore_eos=True))
    sessions = [Session(name, 0, (turn,), np.empty(0, dtype=np.int32)) for name in "ab"]
    timelines, _, _ = run(sessions, False, instances=2, policy=RoundRobin())
    assert timelines["a/0"].finished_ns == timelines["b/0"].finished_ns == 32_000_000


def test_measured_steps_take_time_and_give_the_same_answers():
    modelled, _, _ = run(make_sessions(6), False)
    measured, nodes, _ = run(make_sessions(6), False, step_time=Measured())
    assert {k: t.token_ids.tolist() for k, t in measured.items()} == {
        k: t.token_ids.tolist() for k, t in modelled.items()
    }
    for t in measured.values():
        assert (np.diff(t.token_times_ns) > 0).all() and t.token_times_ns[0] > t.arrival_ns
    assert all(n.busy_ns > 0 for n in nodes)


def test_two_runs_of_one_seed_are_equal_to_the_nanosecond():
    assert as_rows(run(make_sessions(), True)[0]) == as_rows(run(make_sessions(), True)[0])


def test_a_refused_turn_ends_its_session_and_disturbs_no_other():
    sessions = make_sessions(8)
    huge = Turn(np.zeros(3000, dtype=np.int32), SamplingParams(max_tokens=5, ignore_eos=True))
    sessions.append(Session("huge", 0, (huge, huge), np.array([7], dtype=np.int32)))
    timelines, _, _ = run(sessions, True)
    assert timelines["huge/0"].reason == "refused" and "the pool has 400" in timelines["huge/0"].detail
    assert "huge/1" not in timelines
    assert all(t.succeeded for name, t in timelines.items() if name != "huge/0")
