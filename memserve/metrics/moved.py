"""Moved: KV that went from one instance to another, and what the store did with it, in figures."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from memserve.clock import to_s
from memserve.kvcache.ticket import TransferCounts
from memserve.timeline import RequestTimeline


def transfer_figures(counts: TransferCounts) -> dict[str, float]:
    """What was sent one way."""
    figures = asdict(counts)
    seconds = to_s(figures.pop("elapsed_ns"))
    return {**figures, "seconds": seconds}


def all_transfers(**ways: TransferCounts) -> dict[str, dict[str, float]]:
    """What was sent each way, by its name."""
    return {way: transfer_figures(counts) for way, counts in ways.items()}


def store_figures(
    timelines: Sequence[RequestTimeline],
    store: int,
    blocks: tuple[int, int, int] | None,
    received: TransferCounts,
    sent: TransferCounts,
    dropped_tokens: int,
) -> dict[str, Any]:
    """The report's `store`. store: its incarnation.  blocks: that it has, that are cached at the end, and that it has
    evicted; None where it is gone.

    fetches, fetched_tokens: of the requests that found KV there.  received, sent: all that moved, what came too late
    for its request included.  dropped_tokens: that waited for too long at their instances, or were evicted unoffered.
    """
    begun = [timeline.stats for timeline in timelines if timeline.stats is not None]
    came = [s for s in begun if s.fetch is not None and s.fetch.outcome == "fetched" and s.fetch.holder == store]
    num_blocks, num_indexed, num_evicted = blocks or (None, None, None)
    return {
        "num_blocks": num_blocks,
        "num_indexed_blocks": num_indexed,
        "num_evicted_blocks": num_evicted,
        "fetches": len(came),
        "fetched_tokens": sum(stats.num_fetched for stats in came),
        "received": transfer_figures(received),
        "sent": transfer_figures(sent),
        "dropped_tokens": dropped_tokens,
    }
