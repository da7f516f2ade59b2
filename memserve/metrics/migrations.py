"""Migrations in figures: answers that went on at another instance of the role.

# tokens ... t[g-1] | stops, with g tokens; its KV moves, or nobody takes it | t[g] ...
#                   |------------------- stood still ------------------------|
"""

from collections.abc import Sequence
from typing import Any

from memserve.clock import to_s
from memserve.timeline import RequestTimeline


def migration_figures(timelines: Sequence[RequestTimeline]) -> dict[str, Any]:
    """The report's `migrations`. number: of those that came to be; failed: those whose target did not take them.

    tokens: whose KV went along, those included that the target had already.  ahead_tokens: of these, those whose KV
    went ahead, while the answer was decoded.  stood_still_s: from the last token before an answer stopped to the first
    one after it, mean and max over all stops.
    """
    told = [migration for timeline in timelines for migration in timeline.migrations]
    done = [migration for migration in told if migration.done]
    pauses_s = [pause_s for timeline in timelines for pause_s in stood_still_s(timeline)]
    return {
        "number": len(done),
        "failed": len(told) - len(done),
        "tokens": sum(migration.num_tokens for migration in done),
        "ahead_tokens": sum(migration.num_ahead for migration in done),
        "stood_still_s": {
            "mean": sum(pauses_s) / len(pauses_s) if pauses_s else None,
            "max": max(pauses_s, default=None),
        },
    }


def stood_still_s(timeline: RequestTimeline) -> list[float]:
    """Seconds of each stop of an answer that went on afterwards. Whoever was asked in vain made no stop of its own, nor
    did one that was asked while the answer went on (0 tokens).
    """
    times_ns = timeline.token_times_ns
    stops = sorted({migration.num_tokens + 1 - timeline.num_prompt for migration in timeline.migrations})
    return [to_s(int(times_ns[stop] - times_ns[stop - 1])) for stop in stops if 0 < stop < len(times_ns)]
