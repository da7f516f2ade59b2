"""Moved: KV that went from one instance to another, and what stores did with it, in figures."""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from memserve.clock import to_s
from memserve.kvcache.ticket import TransferCounts
from memserve.metrics.formulas import skew
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
    stores: Collection[int],
    blocks: Sequence[tuple[int, int, int]],
    received: Sequence[TransferCounts],
    sent: Sequence[TransferCounts],
    dropped_tokens: int,
) -> dict[str, Any]:
    """The report's `store`. stores: their incarnations.  blocks: of each that is left, those that it has, that are
    cached at the end, and that it has evicted.

    received: by each store.  sent: by each that is left.  In the figures they are all that moved, what came too late
    for its request included, and skew_received, skew_sent say how many times the mean in bytes the most of a store is.
    fetches, fetched_tokens: of the requests that found KV there.  dropped_tokens: that waited for too long at their
    instances, or were evicted unoffered.
    """
    begun = [timeline.stats for timeline in timelines if timeline.stats is not None]
    came = [s for s in begun if s.fetch is not None and s.fetch.outcome == "fetched" and s.fetch.holder in stores]
    num_blocks, num_indexed, num_evicted = map(sum, zip(*blocks, strict=True)) if blocks else (None, None, None)
    return {
        "num_stores": len(stores),
        "num_stores_left": len(blocks),
        "num_blocks": num_blocks,
        "num_indexed_blocks": num_indexed,
        "num_evicted_blocks": num_evicted,
        "fetches": len(came),
        "fetched_tokens": sum(stats.num_fetched for stats in came),
        "received": transfer_figures(sum(received, TransferCounts())),
        "sent": transfer_figures(sum(sent, TransferCounts())),
        "skew_received": skew([counts.bytes for counts in received]),
        "skew_sent": skew([counts.bytes for counts in sent]),
        "dropped_tokens": dropped_tokens,
    }
