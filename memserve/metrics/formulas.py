"""Formulas: every metric of a request, from its timeline's named timestamps. Knows nothing else. Results in seconds.

    # arrival -> queued -> first_scheduled -> prefill_end = first token -> second token -> ... -> last token -> finished
    # |----------------------- TTFT -----------------------|---- ITL ----|---- ITL ------- ... --|
    # |                                                    |--- TPOT: the mean of the ITLs ------|
    # |--------------------------------------------- JCT ---------------------------------------------------|
    # |- dispatch -|---- queue ---|------- prefill --------|--------------------- decode -------------------|
    # handed over:     prefill end -> Ask read -> granted -> last byte there -> first decode step
    #                       |- ask wait -|- grant wait -|- transfer -|- decode queue -|------ decode ----------|
    # by layer Ask read, granted and last byte there may be earlier than prefill end, and count as if they were then

A metric that a request does not have (no token, no second token, not finished) is None, never 0.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from memserve.clock import NS_PER_S, to_s
from memserve.request_stats import RequestStats
from memserve.timeline import RequestTimeline


@dataclass(frozen=True)
class Phases:
    """Where a request's time went, in seconds; None where it never came so far. They add up to its JCT.

    dispatch: arrival until it reached the instance, routing included. fetch: until it waited no longer for KV of
    another instance; None where nobody held more. queue: until its first step began. prefill: until the first token.
    Then, where another instance decodes: ask_wait: until that one had read that it is asked for room, which it does
    between two of its steps. grant_wait: until it had made room; 0 unless there was none when it read so. transfer:
    until the last byte was there; the Grant's way to the sender is in it. decode_queue: until its first step there: the
    wait for the end of the step under way, and for a place in one. decode: until the end; time lost to preemption is in
    it, and an answer's way to the client.

    The four before `decode` are None where one instance does both. By layer room is asked for when the prefill begins:
    what of these waits lies within it is `prefill`, and does not count here.
    """

    dispatch: float | None = None
    fetch: float | None = None
    queue: float | None = None
    prefill: float | None = None
    ask_wait: float | None = None
    grant_wait: float | None = None
    transfer: float | None = None
    decode_queue: float | None = None
    decode: float | None = None


@dataclass(frozen=True, eq=False)
class RequestMetrics:
    """What one request's timeline amounts to, in seconds.

    ttft: time to first token, the first token at the client minus the arrival.
    second_token: the second token minus the arrival; what a hand-off after prefill delays (section 5.1).
    tpot: time per output token, (last token - first token) / (n - 1); an answer of one token has none.
    itl: inter-token latencies, float64 [n - 1], every gap between neighbouring tokens; empty for n < 2. In the first
        one lies the hand-off, where there is any; the others are decoding alone.
    jct: job completion time, the end of the answer minus the arrival.
    """

    ttft: float | None
    second_token: float | None
    tpot: float | None
    itl: np.ndarray
    jct: float | None
    phases: Phases
    class_name: str = ""  # of the request, in a workload of several

    @property
    def max_itl(self) -> float | None:
        """The longest of its gaps, whatever made it: a preemption, a migration, a hand-off, a prompt computed beside
        it, an attempt that began anew. None for n < 2.
        """
        return float(self.itl.max()) if len(self.itl) else None


@dataclass(frozen=True)
class Slo:
    """Service level objectives: the latencies within which an answer is a good one. In seconds; None: any will do.

    tpot_s bounds the mean of an answer's gaps (DistServe), itl_s each of them. Sarathi-Serve bounds the P99 of all
    tokens' gaps (time between tokens, TBT); of one request, which has to be good or not, the longest is the strictest.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_s: float | None = None
    jct_s: float | None = None

    def missed(self, metrics: RequestMetrics) -> list[str]:
        """The objectives that a request which succeeded did not meet; one that it has no latency for is met."""
        latencies = {"ttft_s": metrics.ttft, "tpot_s": metrics.tpot, "itl_s": metrics.max_itl, "jct_s": metrics.jct}
        bounds = ((name, latency, getattr(self, name)) for name, latency in latencies.items())
        return [n for n, latency, bound in bounds if latency is not None and bound is not None and latency > bound]


def measure(timeline: RequestTimeline) -> RequestMetrics:
    """The metrics of one request."""
    times_ns = timeline.token_times_ns
    n = len(times_ns)
    return RequestMetrics(
        ttft=to_s(int(times_ns[0]) - timeline.arrival_ns) if n > 0 else None,
        second_token=to_s(int(times_ns[1]) - timeline.arrival_ns) if n > 1 else None,
        tpot=to_s(int(times_ns[-1] - times_ns[0])) / (n - 1) if n > 1 else None,
        itl=np.diff(times_ns) / NS_PER_S,
        jct=_between_s(timeline.arrival_ns, timeline.finished_ns),
        phases=_phases(timeline),
        class_name=timeline.class_name,
    )


def _phases(timeline: RequestTimeline) -> Phases:
    stats = timeline.stats
    if stats is None:
        return Phases()
    since_ns = stats.queued_ns if stats.fetch_end_ns is None else stats.fetch_end_ns
    phases = Phases(
        dispatch=_between_s(timeline.arrival_ns, stats.queued_ns),
        fetch=_between_s(stats.queued_ns, stats.fetch_end_ns),
        queue=_between_s(since_ns, stats.first_scheduled_ns),
        prefill=_between_s(stats.first_scheduled_ns, stats.prefill_end_ns),
        decode=_between_s(stats.prefill_end_ns, timeline.finished_ns),
    )
    return replace(phases, **_handed_over(stats, timeline.finished_ns))


def _handed_over(stats: RequestStats, finished_ns: int | None) -> dict[str, float | None]:
    """The phases that a hand-off makes, or makes shorter; none where there was none.

    Clocks of two processes differ a little: no event counts as earlier than the one that led to it.
    """
    prefilled_ns = stats.prefill_end_ns
    read_ns, granted_ns, arrived_ns = stats.ask_read_ns, stats.granted_ns, stats.arrived_ns
    if prefilled_ns is None or read_ns is None or granted_ns is None or arrived_ns is None:
        return {}
    read_ns = max(read_ns, prefilled_ns)  # where another was asked before, the first Ask does not matter
    granted_ns = max(granted_ns, read_ns)
    arrived_ns = max(arrived_ns, granted_ns)
    return {
        "ask_wait": to_s(read_ns - prefilled_ns),
        "grant_wait": to_s(granted_ns - read_ns),
        "transfer": to_s(arrived_ns - granted_ns),
        "decode_queue": _between_s(arrived_ns, stats.decode_scheduled_ns),
        "decode": _between_s(stats.decode_scheduled_ns, finished_ns),
    }


def window_ns(timelines: Sequence[RequestTimeline]) -> tuple[int, int] | None:
    """From the first arrival to the last end of a request; None when none has ended."""
    ends_ns = [timeline.finished_ns for timeline in timelines if timeline.finished_ns is not None]
    return (min(timeline.arrival_ns for timeline in timelines), max(ends_ns)) if ends_ns else None


def makespan_s(window: tuple[int, int] | None) -> float | None:
    """Seconds of that window."""
    return None if window is None else to_s(window[1] - window[0])


def instance_s(window: tuple[int, int] | None, stays_ns: Iterable[tuple[int, int | None]]) -> float | None:
    """Seconds of the window that instances were in the cluster, added up. stays_ns: since when, and until when, if they
    have left or are gone.
    """
    if window is None:
        return None
    first_ns, last_ns = window
    whole = [(since_ns, last_ns if until_ns is None else until_ns) for since_ns, until_ns in stays_ns]
    return to_s(sum(max(min(until_ns, last_ns) - max(since_ns, first_ns), 0) for since_ns, until_ns in whole))


def ratio(part: float, whole: float | None) -> float | None:
    """part / whole, or None where there is nothing to take a share of."""
    return part / whole if whole else None


def skew(values: Sequence[float]) -> float | None:
    """Largest over mean: 1 is even, the number of values is all on one. None when there is nothing to share."""
    return ratio(max(values, default=0.0), float(np.mean(values)) if values else None)


def _between_s(start_ns: int | None, end_ns: int | None) -> float | None:
    return None if start_ns is None or end_ns is None else to_s(end_ns - start_ns)
