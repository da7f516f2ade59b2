"""Records: requests.jsonl, one line a request, from which every figure of the report can be computed again."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from memserve.clock import NS_PER_S, to_s
from memserve.decisions import FetchRecord, RouteChoice
from memserve.metrics.formulas import measure
from memserve.metrics.measured import ALL, MeasuredPart
from memserve.request_stats import RequestStats
from memserve.timeline import RequestTimeline

MAX_OTHERS = 7  # instances that a recorded choice lists beside the chosen one: a cluster may have hundreds


def request_record(timeline: RequestTimeline, *, with_tokens: bool = True, part: MeasuredPart = ALL) -> dict[str, Any]:
    """One request as JSON values. Event times in seconds on the cluster's clock, null where it never came so far.

    with_tokens: output_token_ids; without, where they are filler that stands for tokens, their number alone.  part: of
    the run that the report is of; `measured` says whether the request counts there.
    """
    stats, metrics = timeline.stats, measure(timeline)
    token_times_s = (timeline.token_times_ns / NS_PER_S).tolist()
    record = {
        "request_id": timeline.request_id,
        "session_id": timeline.session_id,
        "class": timeline.class_name,
        "priority": timeline.priority,
        "instance": timeline.instance,
        "decode_instance": "" if stats is None else stats.decode_instance,
        "attempt": timeline.attempt,
        "measured": part.has(timeline.arrival_ns),
        "arrival_s": to_s(timeline.arrival_ns),
        "dispatched_s": _seconds(timeline.dispatched_ns),
        "queued_s": _seconds(_of(stats, "queued_ns")),
        "fetch_end_s": _seconds(_of(stats, "fetch_end_ns")),
        "first_scheduled_s": _seconds(_of(stats, "first_scheduled_ns")),
        "prefill_end_s": _seconds(_of(stats, "prefill_end_ns")),
        "asked_s": _seconds(_of(stats, "asked_ns")),
        "ask_read_s": _seconds(_of(stats, "ask_read_ns")),
        "granted_s": _seconds(_of(stats, "granted_ns")),
        "arrived_s": _seconds(_of(stats, "arrived_ns")),
        "received_s": _seconds(_of(stats, "received_ns")),
        "decode_scheduled_s": _seconds(_of(stats, "decode_scheduled_ns")),
        "first_token_s": token_times_s[0] if token_times_s else None,
        "finished_s": _seconds(timeline.finished_ns),
        "ttft_s": metrics.ttft,
        "tpot_s": metrics.tpot,
        "max_itl_s": metrics.max_itl,
        "jct_s": metrics.jct,
        **_routes(timeline.routes),
        "num_prompt": timeline.num_prompt,
        "num_cached_local": _of(stats, "num_cached_local"),
        "num_fetched": _of(stats, "num_fetched"),
        "num_computed": _of(stats, "num_computed"),
        "num_computed_on_decode": _of(stats, "num_computed_on_decode"),
        "num_generated": timeline.num_output,
        "num_preemptions": _of(stats, "num_preemptions"),
        "fetch": None if stats is None or stats.fetch is None else fetch_record(stats.fetch),
        "migrations": msgspec.to_builtins(timeline.migrations),
        "finish_reason": None if timeline.reason is None else str(timeline.reason),
        "detail": timeline.detail,
        "token_times_s": token_times_s,
    }
    if with_tokens:
        record["output_token_ids"] = timeline.token_ids.tolist()
    if timeline.logprobs:
        record["logprobs"] = msgspec.to_builtins(timeline.logprobs, str_keys=True)
    return record


def _routes(routes: Sequence[RouteChoice]) -> dict[str, Any]:
    """Every choice made for a request; of the first also why, and the predictions for its first token, apart."""
    first = routes[0] if routes else None
    at = None if first is None else first.first_token_s
    return {
        "routes": [_route_record(route) for route in routes],
        "why": "" if first is None else first.why,
        "predicted_s": None if first is None or at is None else float(at[first.chosen]),
        "predicted_soonest_s": None if at is None else float(at.min()),
        "predicted_elsewhere_s": None if first is None else first.elsewhere_s,
    }


def _route_record(route: RouteChoice) -> dict[str, Any]:
    """A choice among num_instances: of the one chosen and the best others, a value in each list."""
    at, rows = route.first_token_s, _listed(route)
    return {
        "instance": route.labels[route.chosen],
        "why": route.why,
        "num_instances": len(route.labels),
        "instances": [route.labels[row] for row in rows],
        "num_cached": route.num_cached[rows].tolist(),
        "num_requests": route.num_requests[rows].tolist(),
        "predicted_s": None if at is None else at[rows].tolist(),
    }


def _listed(route: RouteChoice) -> np.ndarray:
    """int64: the row that was chosen and the MAX_OTHERS best others, in order of rows.

    Best: the first token is predicted soonest, or where that is unknown more is cached; then fewer requests.
    """
    others = np.flatnonzero(np.arange(len(route.labels)) != route.chosen)
    at, cached, requests = route.first_token_s, -route.num_cached[others], route.num_requests[others]
    keys = (requests, cached) if at is None else (requests, cached, at[others])
    best = others[np.lexsort(keys)[:MAX_OTHERS]]
    return np.sort(np.append(best, route.chosen))


def fetch_record(record: FetchRecord) -> dict[str, Any]:
    """A decision to fetch or to compute; times and predictions in seconds, `actual_fetch_s` null where nothing came.
    earlier: those before it, in the same form.

    What computing took in fact is the request's prefill: from first_scheduled_s to prefill_end_s.
    """
    values = msgspec.to_builtins(record)
    began_ns, arrived_ns, ended_ns = (values.pop(name) for name in ("began_ns", "arrived_ns", "ended_ns"))
    fetched_s = None if record.outcome != "fetched" or ended_ns is None else to_s(ended_ns - began_ns)
    times_s = {"began_s": to_s(began_ns), "arrived_s": _seconds(arrived_ns), "ended_s": _seconds(ended_ns)}
    earlier = [fetch_record(one) for one in record.earlier]
    return {**values, **times_s, "actual_fetch_s": fetched_s, "earlier": earlier}


def record_lines(
    timelines: Iterable[RequestTimeline], *, with_tokens: bool = True, part: MeasuredPart = ALL
) -> Iterator[str]:
    """The lines of requests.jsonl, each with its line end. with_tokens, part: as of `request_record`."""
    for timeline in timelines:
        record = request_record(timeline, with_tokens=with_tokens, part=part)
        yield json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _of(stats: RequestStats | None, name: str) -> int | None:
    return None if stats is None else getattr(stats, name)


def _seconds(time_ns: int | None) -> float | None:
    return None if time_ns is None else to_s(time_ns)
