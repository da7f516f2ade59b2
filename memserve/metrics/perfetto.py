"""Perfetto: a run as a trace that ui.perfetto.dev, or chrome://tracing, opens. Knows the files of a run, no cluster.

One process an instance, with its steps, what it sends to others, and a counter of its blocks; one process for the
requests, with the phases of each. Times are microseconds on the cluster's clock, as the
Trace Event Format has them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from memserve.metrics.activity import ActivitySpan
from memserve.metrics.occupancy import Sample

Event = dict[str, Any]
REQUESTS = 1  # the process of the requests; instances follow
STEPS = 0  # the thread of an instance's steps
_US_PER_S = 1e6
PHASES = (  # of a request: name, and when it begins and ends: a record's keys, or from when it waited for a step
    ("fetch", "queued_s", "fetch_end_s"),
    ("queue", "waits_from_s", "first_scheduled_s"),
    ("prefill", "first_scheduled_s", "prefill_end_s"),
    ("ask wait", "asked_s", "ask_read_s"),
    ("grant wait", "ask_read_s", "granted_s"),
    ("transfer", "granted_s", "arrived_s"),
    ("decode queue", "arrived_s", "decode_scheduled_s"),
    ("decode", "decode_scheduled_s", "finished_s"),
)
DECODE_HERE = ("decode", "prefill_end_s", "finished_s")  # where the instance that prefilled goes on


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
            yield from _asynchronous(name, pid, number, span.start_s, span.end_s, span.figures)
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
    yield from _asynchronous(name, REQUESTS, number, record["arrival_s"], record["finished_s"], figures)
    handed_over = record["decode_scheduled_s"] is not None
    waits_from_s = record["queued_s"] if record["fetch_end_s"] is None else record["fetch_end_s"]
    times_s = {**record, "waits_from_s": waits_from_s}
    for phase, begin, end in PHASES if handed_over else (*PHASES[:3], DECODE_HERE):
        start_s, end_s = times_s[begin], times_s[end]
        if start_s is not None and end_s is not None and end_s >= start_s:
            yield from _asynchronous(phase, REQUESTS, number, start_s, end_s, {})


def _asynchronous(
    name: str, pid: int, number: int, start_s: float, end_s: float, figures: Mapping[str, Any]
) -> Iterator[Event]:
    common = {"name": name, "cat": "async", "id": f"{pid}/{number}", "pid": pid, "tid": STEPS}
    yield {"ph": "b", "ts": start_s * _US_PER_S, "args": dict(figures), **common}
    yield {"ph": "e", "ts": end_s * _US_PER_S, **common}


def _counter(sample: Sample, pid: int) -> Event:
    used = {kind: count for kind, count in sample.hbm.items() if kind != "free"}
    return {"ph": "C", "name": "HBM blocks", "pid": pid, "tid": STEPS, "ts": sample.time_s * _US_PER_S, "args": used}


def _named(what: str, pid: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": STEPS, "args": {"name": name}}
