"""The cases of bench_fetch.py: which prompts are held where, what moving and computing them takes, and who was right.

Knows no command line and prints nothing.

    # a prompt: [0, num_cached) is here | [num_cached, num_held) could be fetched | [num_held, num_tokens) is computed
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from pacing import Timed
from step_grid import Case, StepTimer, draw_log
from transfer_ends import RECEIVER, Ends

from memserve.kvcache import CacheGeometry, DiscreteLayout
from memserve.kvcache.granularity import ByRequest, End, Granularity, Packed
from memserve.sched.cost_model.fit import nonnegative_least_squares
from memserve.sched.cost_model.transfer import NUM_MESSAGES, TransferCost
from memserve.sched.fetch_policy import Choice, FetchPrices
from memserve.transfer.link import LinkModel

WAYS: dict[str, type[Granularity]] = {"by_request": ByRequest, "packed": Packed}
MARGIN = 0.1  # cases nearer to break-even than this are nobody's fault


def draw_cases(
    number: int, max_context: int, max_batch: int, block_size: int, rng: np.random.Generator
) -> list[list[Choice]]:
    """Batches of 1 to max_batch prompts; blocks that are missing and new tokens are drawn evenly
    over their logarithms.
    """
    draw = partial(draw_log, rng)

    def choice() -> Choice:
        most = (max_context - 1) // block_size
        num_missing = draw(1, most)
        num_cached = int(rng.integers(0, most - num_missing + 1)) if rng.random() < 0.7 else 0
        num_held = (num_cached + num_missing) * block_size
        return Choice(num_held + draw(1, max_context - num_held), num_cached * block_size, num_held)

    return [[choice() for _ in range(1 + i % max_batch)] for i in range(number)]


def block_counts(most: int) -> list[int]:
    """Blocks of the transfers that a wire is fitted to: 1 to most, evenly over their logarithms."""
    return sorted({round(most ** (i / 11)) for i in range(12)})


class Wire:
    """KV blocks from this process to the other's arena by one transport and granularity."""

    def __init__(self, ends: Ends, transport: str, way: str, geometry: CacheGeometry, rng: np.random.Generator) -> None:
        self.name, self._ends, self._rng = f"{transport}, {way}", ends, rng
        self._sender, self._geometry = ends.sender(transport), geometry
        self._granularity = WAYS[way](DiscreteLayout(), geometry)
        self._room = len(ends.memory) // geometry.block_bytes

    def seconds(self, num_blocks: Sequence[int]) -> float:
        """Until the blocks of all requests, scattered at both ends, have arrived, posted one after the other."""
        moves = []
        for count in num_blocks:
            here, there = (self._rng.permutation(self._room)[:count].astype(np.int32) for _ in range(2))
            source, target = End((self._sender[0], 0), self._room, here), End((RECEIVER, 0), self._room, there)
            moves += self._granularity.moves(source, target, None)
        return self._ends.carry_s(self._sender, moves)

    def fit(self, counts: Sequence[int], seconds: np.ndarray) -> TransferCost:
        """What single transfers of `counts` blocks take: each of them, a call, a byte (least relative error, none < 0).

        seconds: float64 [counts]. What a transfer takes however short it is, threads that wake up at both ends, is the
        link's control messages to the policy: those are in no figure here.
        """
        unit = TransferCost.of(LinkModel(0.0, 1.0), self._granularity, self._geometry.num_layers)
        blocks = np.array(counts)
        each = (np.ones(len(counts)), unit.other_calls + unit.block_calls * blocks, unit.block_bytes * blocks)
        features = np.stack(each, axis=1) / seconds[:, None]
        transfer_s, latency_s, byte_s = nonnegative_least_squares(features, np.ones(len(counts))).tolist()
        link = LinkModel(latency_s, 1e-9 / byte_s if byte_s else float("inf"), transfer_s / NUM_MESSAGES)
        return TransferCost.of(link, self._granularity, self._geometry.num_layers)


@dataclass(frozen=True, eq=False)
class CaseTimes:
    """Seconds of every case, float64 [cases, repeats]: its transfer, its step without what is missing, and with it."""

    fetch: np.ndarray
    without: np.ndarray
    with_it: np.ndarray

    def both(self, repeats: slice) -> tuple[np.ndarray, np.ndarray]:
        """(fetch_s, compute_s) [cases]: medians of some repeats; computing costs what a step takes longer without."""
        fetch, without, with_it = (np.median(x[:, repeats], axis=1) for x in (self.fetch, self.without, self.with_it))
        return fetch, without - with_it


def ways_of(case: Sequence[Choice], wires: Sequence[Wire], timer: StepTimer, block_size: int) -> list[Timed]:
    """What a case is measured by: its transfer on each wire, its step without what is missing, and with it."""
    missing = [(c.num_held - c.num_cached) // block_size for c in case]
    without = Case([c.num_cached for c in case], [c.num_tokens - c.num_cached for c in case])
    with_it = Case([c.num_held for c in case], [c.num_tokens - c.num_held for c in case])
    return [
        *(partial(wire.seconds, missing) for wire in wires),
        *(partial(timer.seconds, s) for s in (without, with_it)),
    ]


@dataclass(frozen=True, eq=False)
class Verdict:
    """Choices against what was measured, bool [cases] each. far: farther than MARGIN from break-even."""

    chose_fetch: np.ndarray
    fetch_was_faster: np.ndarray
    far: np.ndarray

    @property
    def right(self) -> np.ndarray:
        return self.chose_fetch == self.fetch_was_faster

    def share_right(self, *, far: bool) -> float:
        """Of all cases, or of those far from break-even; NaN where there is none."""
        counted = self.right[self.far] if far else self.right
        return float(counted.mean()) if len(counted) else float("nan")

    def count(self, chose: bool, faster: bool) -> int:
        """Far cases with that choice and that outcome."""
        return int((self.far & (self.chose_fetch == chose) & (self.fetch_was_faster == faster)).sum())


def judge(chose_fetch: np.ndarray, fetch_s: np.ndarray, compute_s: np.ndarray) -> Verdict:
    """chose_fetch: bool [cases].  fetch_s, compute_s: float64 [cases], measured."""
    far = np.abs(fetch_s - compute_s) > MARGIN * np.abs(compute_s)
    return Verdict(chose_fetch, fetch_s <= compute_s, far)


def predict(cases: Sequence[list[Choice]], prices: FetchPrices) -> tuple[np.ndarray, np.ndarray]:
    """(fetch_s, compute_s) [cases]: both sides of Eq. 2 as the policy is told them."""
    sides = [(prices.fetch_time_s(case), prices.compute_time_s(case)) for case in cases]
    fetch_s, compute_s = np.array(sides).T
    return fetch_s, compute_s
