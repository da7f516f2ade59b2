"""Pacing: seconds of calls on a machine whose pace changes, in terms of one and the same call between them.

What others do on a shared machine makes everything here one and a half times as slow for a part of a second, and then
not. Medians of a few repeats then say more about when each call had its turn than about the calls. A call as long as
such changes or longer averages over them by itself. A shorter one is run in turn with the pace, a call that is always
the same; how many times as long as the pace it takes, hardly changes. What the pace takes right after another call says
something of that, too (of the processor's caches, which it has filled), so it counts once it has run for a while.
Knows no model and no transfer.
"""

from collections.abc import Callable, Sequence

import numpy as np
from rich.progress import track

Timed = Callable[[], float]
LONG_S = 0.1  # a call that averages over the machine's changes by itself
SETTLE_S = 0.004  # after which the pace no longer depends on what ran before it


def paced_times(
    calls: Sequence[Timed], pace: Timed, repeats: int, repeat_s: float, rng: np.random.Generator
) -> np.ndarray:
    """Seconds of each call, float64 [calls, repeats]: all of them once a repeat, in random order.

    A repeat is the mean of as many runs of a call as take repeat_s, one at least. Those of a call shorter than LONG_S
    are run in turn with the pace: their mean counts over that of the pace beside it, times the mean of the pace beside
    all calls. Two runs of each come first and do not count: first touches of memory, and how long it is.
    """
    for call in calls:
        call()
    lasts_s = np.array([call() for call in calls])
    num_runs, paced = np.maximum(repeat_s / lasts_s, 1).astype(int), lasts_s < LONG_S
    own, beside = np.zeros((2, len(calls), repeats))
    for repeat in track(range(repeats), description=f"{len(calls)} calls"):
        for i in rng.permutation(len(calls)):
            if paced[i]:
                own[i, repeat], beside[i, repeat] = _in_turn(calls[i], pace, num_runs[i])
            else:
                own[i, repeat] = np.mean([calls[i]() for _ in range(num_runs[i])])
    if paced.any():
        own[paced] *= beside[paced].mean() / beside[paced]
    return own


def _in_turn(call: Timed, pace: Timed, num_runs: int) -> tuple[float, float]:
    """(mean seconds of the call, mean seconds of the pace beside it)."""
    beside, own = [_settled(pace)], []
    for _ in range(num_runs):
        own.append(call())
        beside.append(_settled(pace))
    return float(np.mean(own)), float(np.mean(beside))


def _settled(pace: Timed) -> float:
    """Seconds of the pace's last run, of as many as take SETTLE_S; one where it is longer itself."""
    spent_s = last_s = pace()
    while spent_s < SETTLE_S:
        last_s = pace()
        spent_s += last_s
    return last_s
