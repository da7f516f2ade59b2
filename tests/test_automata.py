"""The request automaton of docs/design.md, read from its tables and played cell by cell on the real classes."""

from pathlib import Path

import numpy as np
import pytest
from mini_cluster import dispatch, group_of, hash_instance

from memserve.instance import Instance
from memserve.messages import Abort, Cancel, Finished, Message, Submit, Tokens, pack_times, pack_tokens
from memserve.request import FinishReason
from memserve.sampling_params import SamplingParams
from memserve.sched.global_scheduler import CLIENT, GlobalScheduler
from memserve.sched.routing import RoundRobin

DESIGN = Path(__file__).resolve().parents[1] / "docs" / "design.md"
ANSWER = SamplingParams(max_tokens=100, ignore_eos=True)


def cells(table: str) -> list[tuple[str, str, str]]:
    """(state, event, what happens) for every cell of the table below `<!-- table: NAME -->`."""
    after = DESIGN.read_text(encoding="utf-8").split(f"<!-- table: {table} -->\n", maxsplit=1)[1]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in after.split("\n\n", maxsplit=1)[0].splitlines()]
    head, body = rows[0], rows[2:]
    return [(row[0], event, cell) for row in body for event, cell in zip(head[1:], row[1:], strict=True)]


GLOBAL = cells("global scheduler")
INSTANCE = [cell for cell in cells("instance") if cell[2] != "-"]  # a bare dash is never sent by a correct scheduler


def global_message(event: str) -> Message:
    attempt = 1 if "another attempt" in event else 0
    match event.split()[0]:
        case "Submit":
            return Submit("r", "s", pack_tokens(np.arange(3)), ANSWER, 0)
        case "Cancel":
            return Cancel("r")
        case "Tokens":
            return Tokens("r", attempt, 0, pack_tokens(np.arange(1)), pack_times(np.arange(1)))
        case _:
            return Finished("r", attempt, FinishReason.LENGTH, "", None)


def global_state(scheduler: GlobalScheduler) -> str:
    if "r" not in scheduler.timelines:
        return "new"
    return "routed" if scheduler.num_unfinished else "ended"


@pytest.mark.parametrize(("state", "event", "expected"), GLOBAL)
def test_the_global_scheduler_follows_its_table(state: str, event: str, expected: str) -> None:
    scheduler = GlobalScheduler(group_of(["colocated-0"], RoundRobin()), np.random.default_rng(0))
    for step in ("Submit", "Finished")[: ("new", "routed", "ended").index(state)]:
        scheduler.receive(global_message(step), 0)
    assert global_state(scheduler) == state
    scheduler.drain_outbox()
    if expected == "error":
        with pytest.raises(ValueError, match="submitted before"):
            scheduler.receive(global_message(event), 1)
        return
    scheduler.receive(global_message(event), 1)
    after, sent = expected.split(": ")
    assert global_state(scheduler) == after
    outbox = [(type(m).__name__, "client" if to == CLIENT else "instance") for to, m in scheduler.drain_outbox()]
    assert outbox == ([] if sent == "-" else [(sent.split()[0], sent.split()[-1])])


def instance_in(state: str) -> Instance:
    """An instance that decodes `old` and has brought request `r`, a prompt of two chunks, into `state`."""
    places = 2 if state in ("prefilling", "decoding") else 1
    instance = hash_instance(block_size=1, chunk_size=4, num_blocks=200, max_context=150, max_running=places)
    dispatch(instance, "old", np.arange(3), ANSWER)
    step(instance)
    if state != "unknown":
        dispatch(instance, "r", np.arange(50, 58), ANSWER)
    for _ in range({"waiting": 1, "prefilling": 1, "decoding": 2}.get(state, 0)):
        step(instance)
    instance.drain_outbox()
    assert instance_state(instance) == state
    return instance


def step(instance: Instance) -> None:
    batch = instance.schedule(0)
    if batch is not None:
        instance.commit(batch, instance.forward(batch), np.array([0]))
    instance.check()


def instance_state(instance: Instance) -> str:
    scheduler = instance.scheduler
    running = [r for r in scheduler.running if r.request_id == "r"]
    if running:
        return "decoding" if running[0].num_generated else "prefilling"
    return "waiting" if instance.num_unfinished == 2 else "unknown"  # beside `old`, which is served or preempted


def play(instance: Instance, event: str) -> None:
    match event:
        case "Dispatch":
            dispatch(instance, "r", np.arange(50, 58), ANSWER)
        case "Dispatch that can never be served":
            dispatch(instance, "r", np.empty(0, dtype=np.int32), ANSWER)
        case "Abort" | "Abort of another attempt":
            instance.receive(Abort("r", 0 if event == "Abort" else 1))
        case "a step with room for it":
            if instance.scheduler.room.waiting:
                instance.receive(Abort("old", 0))  # which has the only place
            return step(instance)
        case "a step without room":
            instance.pool.alloc(instance.pool.num_available, ("test",))
            return step(instance)
        case _:
            raise AssertionError(f"unknown event {event!r}")
    instance.schedule(0)  # reads the inbox; what it picks is not computed, so that the message alone counts


@pytest.mark.parametrize(("state", "event", "expected"), INSTANCE)
def test_the_instance_follows_its_table(state: str, event: str, expected: str) -> None:
    instance = instance_in(state)
    play(instance, event)
    after, sent = expected.split(": ")
    assert instance_state(instance) == after
    mine = [m for m in instance.drain_outbox() if m.request_id == "r"]
    names = [f"Finished({m.reason})" if isinstance(m, Finished) else type(m).__name__ for m in mine]
    assert names == ([] if sent == "-" else [sent])
