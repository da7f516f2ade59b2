"""Perfetto: a run as a trace that ui.perfetto.dev, or chrome://tracing, opens. Knows the files of a run, no cluster.

One process an instance, with its steps, what it sends to others, and a counter of its blocks; one process for the
requests, with the phases of each and, beside them, those of the move of its KV. Times are microseconds on the
cluster's clock, as the Trace Event Format has them; what has one id nests: each event begins and ends within another
one, or beside it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from memserve.metrics.activity import ActivitySpan
from memserve.metrics.occupancy import Sample

Event = dict[str, Any]
REQUESTS = 1  # the process of the requests; instances follow
STEPS = 0  # the thread of an instance's steps
_US_PER_S = 1e6
PHASES = (  # of a request: name, and when it begins and ends: a record's keys, or one of _between
    ("fetch", "queued_s", "fetch_end_s"),
    ("queue", "waits_from_s", "first_scheduled_s"),
    ("prefill", "first_scheduled_s", "prefill_end_s"),
)
DECODE_HERE = (("decode", "prefill_end_s", "finished_s"),)  # where the instance that prefilled goes on
DECODE_THERE = (("decode queue", "waits_there_from_s", "decode_scheduled_s"),
                ("decode", "decode_scheduled_s", "finished_s"))  # fmt: skip
MOVE = (  # of its KV: by layer beside the queue and the prefill, so on a track of its own
    ("ask wait", "asked_s", "ask_read_s"),
    ("grant wait", "ask_read_s", "granted_s"),
    ("transfer", "granted_s", "arrived_s"),
)


def trace_of(
    records: Iterable[Mapping[str, Any]], activity: Sequence[ActivitySpan], occupancy: Iterable[Sample]
) -> dict[str, Any]:
    """The trace as JSON values. records: of requests.jsonl."""
    names = dict.fromkeys([span.instance for span in activity] + [sample.instance for sample in occupancy])
    processes = {name: REQUESTS + 1 + i for i, name in enumerate(names)}
    events: list[Event] = [_named("process_name", REQUESTS, "requests")]
    events += [_named("process_name", pid, name) for name, pid in processes.items()]
    events += _spans(activity, processes)
    events += (_counter(sample, processes[sample.instance]) for sample in occupancy)
    for number, record in enumerate(records):
        events += _request(record, number)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _spans(activity: Sequence[ActivitySpan], processes: Mapping[str, int]) -> Iterator[Event]:
    """Steps follow each other; the transfers of one pair may overlap, so each is an event of its own."""
    for pid in processes.values():
        yield _named("thread_name", pid, "steps")
    for number, span in enumerate(activity):
        pid, name = processes[span.instance], _name(span)
        if span.to:
            yield from _asynchronous(name, pid, f"{pid}/{number}", span.start_s, span.end_s, span.figures)
        else:
            yield {
                "ph": "X", "name": name, "cat": "step", "pid": pid, "tid": STEPS, "ts": span.start_s * _US_PER_S,
                "dur": (span.end_s - span.start_s) * _US_PER_S, "args": {"count": span.count, **span.figures},
            }  # fmt: skip


def _name(span: ActivitySpan) -> str:
    if span.to:
        return f"{span.figures['tokens']:,} tokens to {span.to}"
    prefill, decode = span.figures["prefill_tokens"], span.figures["decode_tokens"]
    return " + ".join(f"{n:,} {word}" for n, word in ((prefill, "prefill"), (decode, "decode")) if n) or "step"


def _request(record: Mapping[str, Any], number: int) -> Iterator[Event]:
    """A request from its arrival to its end, and its phases within that; those that it never came to are missing."""
    if record["finished_s"] is None:
        return
    name, shown = record["request_id"], ("instance", "decode_instance", "num_prompt", "num_cached_local",
                                          "num_generated", "finish_reason")  # fmt: skip
    figures = {key: record[key] for key in shown}
    key, start_s, end_s = f"{REQUESTS}/{number}", record["arrival_s"], record["finished_s"]
    moved = record["decode_scheduled_s"] is not None
    times_s = {**record, **_between(record)}
    phases = _in_order((*PHASES, *(DECODE_THERE if moved else DECODE_HERE)), times_s, key, start_s)
    yield from _asynchronous(name, REQUESTS, key, start_s, end_s, figures, phases)
    moves = _in_order(MOVE, times_s, f"{key}/KV", start_s) if moved else []
    if moves:
        first_s, last_s = moves[0]["ts"] / _US_PER_S, moves[-1]["ts"] / _US_PER_S
        yield from _asynchronous(f"KV of {name}", REQUESTS, f"{key}/KV", first_s, last_s, {}, moves)


def _between(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Times that no event has: from when it waited for a step, here and there, and for the grant (see formulas.py)."""
    fetched_s, prefilled_s, arrived_s = record["fetch_end_s"], record["prefill_end_s"], record["arrived_s"]
    asked_s = prefilled_s if record["asked_s"] is None else record["asked_s"]
    return {
        "waits_from_s": record["queued_s"] if fetched_s is None else fetched_s,
        "waits_there_from_s": None if None in (arrived_s, prefilled_s) else max(arrived_s, prefilled_s),
        "asked_s": None if None in (asked_s, prefilled_s) else min(asked_s, prefilled_s),
    }


def _in_order(
    phases: Iterable[tuple[str, str, str]], times_s: Mapping[str, Any], key: str, from_s: float
) -> list[Event]:
    """Phases one after the other, none before `from_s`: clocks of two processes differ a little."""
    events: list[Event] = []
    for phase, begin, end in phases:
        if times_s[begin] is not None and times_s[end] is not None:
            start_s = max(times_s[begin], from_s)
            from_s = min(max(times_s[end], start_s), times_s["finished_s"])
            events += _asynchronous(phase, REQUESTS, key, min(start_s, from_s), from_s, {})
    return events


def _asynchronous(
    name: str, pid: int, key: str, start_s: float, end_s: float, figures: Mapping[str, Any],
    within: Iterable[Event] = (),
) -> Iterator[Event]:  # fmt: skip
    """An event, and those of the same id within it."""
    common = {"name": name, "cat": "async", "id": key, "pid": pid, "tid": STEPS}
    yield {"ph": "b", "ts": start_s * _US_PER_S, "args": dict(figures), **common}
    yield from within
    yield {"ph": "e", "ts": end_s * _US_PER_S, **common}


def _counter(sample: Sample, pid: int) -> Event:
    used = {kind: count for kind, count in sample.hbm.items() if kind != "free"}
    return {"ph": "C", "name": "HBM blocks", "pid": pid, "tid": STEPS, "ts": sample.time_s * _US_PER_S, "args": used}


def _named(what: str, pid: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": STEPS, "args": {"name": name}}
