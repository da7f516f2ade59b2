"""The figures of bench_transfer.py: moves of one size after another, and of a Llama2-13B-shaped cache (Fig. 11).

Knows no command line and prints nothing. What is compared is timed in turn in the same run; times are medians.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import torch
from transfer_ends import RECEIVER, Ends

from memserve.kvcache import AggregatedLayout, CacheGeometry, DiscreteLayout, Layout
from memserve.kvcache.granularity import ByLayer, ByRequest, ByRequestAgg, End, Granularity, Packed
from memserve.transfer import Move

NUM_TOKENS = 2048
LLAMA2_13B = CacheGeometry(num_layers=40, block_size=16, num_kv_heads=40, head_dim=128, dtype=torch.float16)
NUM_BLOCKS = NUM_TOKENS // LLAMA2_13B.block_size
ROW_BYTES = 1 << 14
SIZES = tuple(ROW_BYTES * 4**i for i in range(8))  # 16 KB to 256 MB
NUM_REQUESTS = 8
MANY_BYTES = 1 << 24  # small messages go in numbers that make this much
CHANNELS = (1, 2, 4, 8, 16)
PAPER_DISCRETE_MS = {1: 102.0, 2: 69.0, 4: 38.5, 8: 29.6, 16: 24.2}  # Fig. 11a, one thread
PAPER_AGGREGATED_MS = 19.3  # in every setting drawn
WAYS: tuple[tuple[type[Granularity], Layout], ...] = (
    (ByLayer, DiscreteLayout()), (ByLayer, AggregatedLayout()), (ByRequest, DiscreteLayout()),
    (ByRequestAgg, AggregatedLayout()), (Packed, DiscreteLayout()), (Packed, AggregatedLayout()),
)  # fmt: skip
MB = 1 << 20


@dataclass(frozen=True)
class TransferFigure:
    """`num_bytes` in `num_calls` calls took `seconds`, and the same `beside` something else `beside_s`.

    goal: of the ratio to it.  goal_gb_per_s: of the rate.  paper: the paper's ratio.
    """

    part: str
    what: str
    num_bytes: int
    num_calls: int
    seconds: float
    beside: str = ""
    beside_s: float | None = None
    goal: float | None = None
    goal_gb_per_s: float | None = None
    paper: float | None = None

    @property
    def gb_per_s(self) -> float:
        return self.num_bytes / self.seconds / 1e9

    @property
    def us_per_call(self) -> float:
        return self.seconds / self.num_calls * 1e6

    @property
    def ratio(self) -> float | None:
        """Of the rate to that of what it is compared with."""
        return None if self.beside_s is None else self.beside_s / self.seconds

    @property
    def reached(self) -> bool | None:
        if self.goal_gb_per_s is not None:
            return self.gb_per_s >= self.goal_gb_per_s
        return None if self.goal is None or self.ratio is None else self.ratio >= self.goal


def in_turn(calls: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turn, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            seconds = call()
            if turn:
                times[name].append(seconds)
    return {name: median(values) for name, values in times.items()}


def size_figures(ends: Ends, sizes: Sequence[int], repeats: int, seed: int) -> Iterator[TransferFigure]:
    """Messages of one size, from and to scattered places, beside a copy and a bare process group.

    A packed move gathers the same bytes from rows of 16 KB into one message, beside one message from one buffer.
    """
    rng = np.random.default_rng(seed)
    for size in sizes:
        count = max(1, min(MANY_BYTES, len(ends.memory)) // size)
        took = _times_of_size(ends, size, count, repeats, rng)
        name, num_bytes = f"{size // 1024:,} KB", size * count
        goals = 0.8 if size >= MB else None, 0.9, 0.9 if size >= 4 * MB else None
        yield TransferFigure("sizes", f"memcpy, {name}", num_bytes, count, took["memcpy"])
        for word, beside, goal in (("mapped", "memcpy", goals[0]), ("gloo", "raw gloo", goals[1])):
            yield TransferFigure("sizes", f"{word}, {name}", num_bytes, count, took[word], beside, took[beside], goal)
        yield TransferFigure("sizes", f"raw gloo, {name}", num_bytes, count, took["raw gloo"])
        yield TransferFigure(
            "sizes", f"packed, {name}", size, 1, took["packed"], "one buffer", took["one buffer"], goals[2]
        )


def _times_of_size(ends: Ends, size: int, count: int, repeats: int, rng: np.random.Generator) -> dict[str, float]:
    mapped, gloo = ends.sender("mapped"), ends.sender("gloo")
    rows, to = (rng.permutation(len(ends.memory) // size)[:count] for _ in range(2))
    narrow, narrow_to = (rng.permutation(len(ends.memory) // ROW_BYTES)[: size // ROW_BYTES] for _ in range(2))
    by_mapped, by_gloo = (_scattered(sender[0], size, rows, to) for sender in (mapped, gloo))
    packed = _scattered(gloo[0], ROW_BYTES, narrow, narrow_to, packed=True)
    return in_turn(
        {
            "memcpy": lambda: ends.copy_s(size, rows, to),
            "mapped": lambda: ends.carry_s(mapped, [by_mapped]),
            "raw gloo": lambda: ends.raw_s(size, count),
            "gloo": lambda: ends.carry_s(gloo, [by_gloo]),
            "one buffer": lambda: ends.raw_s(size, 1),
            "packed": lambda: ends.carry_s(gloo, [packed]),
        },
        repeats,
    )


def scattered_figures(ends: Ends, repeats: int, seed: int) -> Iterator[TransferFigure]:
    """Requests of 256 blocks of 16 KB, each in a place of its own, posted one after the other."""
    rng, count = np.random.default_rng(seed), 256
    num_requests = min(NUM_REQUESTS, len(ends.memory) // ROW_BYTES // count)
    rows, to = (rng.permutation(len(ends.memory) // ROW_BYTES)[: count * num_requests] for _ in range(2))
    pairs = list(zip(np.split(rows, num_requests), np.split(to, num_requests), strict=True))
    mapped, gloo = ends.sender("mapped"), ends.sender("gloo")
    by_mapped, by_gloo = ([_scattered(end[0], ROW_BYTES, *pair) for pair in pairs] for end in (mapped, gloo))
    packed = [_scattered(gloo[0], ROW_BYTES, *pair, packed=True) for pair in pairs]
    took = in_turn(
        {
            "memcpy": lambda: ends.copy_s(ROW_BYTES, rows, to),
            "mapped": lambda: ends.carry_s(mapped, by_mapped),
            "gloo": lambda: ends.carry_s(gloo, by_gloo),
            "packed": lambda: ends.carry_s(gloo, packed),
        },
        repeats,
    )
    for name, seconds in took.items():
        goal = 5.0 if name == "mapped" else None
        num_calls = num_requests if name == "packed" else len(rows)
        yield TransferFigure("scattered", name, len(rows) * ROW_BYTES, num_calls, seconds, "memcpy", took["memcpy"],
                             goal_gb_per_s=goal)  # fmt: skip


def granularity_figures(ends: Ends, num_layers: int, repeats: int, seed: int) -> Iterator[TransferFigure]:
    """2048 tokens in scattered blocks, every granularity and layout it has, by both transports."""
    request = Request13B(ends, num_layers, seed)
    for way, layout in WAYS:
        num_calls, took = _times_of_way(ends, request, way, layout, repeats)
        for word, beside in (("mapped", "memcpy"), ("gloo", "raw gloo")):
            goal = 0.9 if word == "gloo" and way in (ByRequestAgg, Packed) else None
            name = f"{word}, {way.__name__}, {layout.name}"
            yield TransferFigure(
                "granularity", name, request.num_bytes, num_calls, took[word], beside, took[beside], goal
            )


def device_figures(ends: Ends, num_layers: int, repeats: int, seed: int) -> Iterator[TransferFigure]:
    """The same request beside one plain copy of as many bytes on the device that both memories lie on.

    By layer, moves are posted all at once here: as in a step, but with no layer computed between them.
    """
    request = Request13B(ends, num_layers, seed)
    for way, layout in WAYS:
        senders = {word: ends.sender(word) for word in ("mapped", "gloo")}
        calls = {
            word: partial(ends.carry_s, sender, request.moves(way, layout, sender[0]))
            for word, sender in senders.items()
        }
        took = in_turn(calls | {"copy": lambda: ends.one_copy_s(request.num_bytes)}, repeats)
        num_calls = sum(move.num_calls for move in request.moves(way, layout, senders["mapped"][0]))
        for word in senders:
            goal = 0.8 if word == "mapped" and way is not ByLayer else None
            name = f"{word}, {way.__name__}, {layout.name}"
            yield TransferFigure("device", name, request.num_bytes, num_calls, took[word], "copy", took["copy"], goal)


def _times_of_way(
    ends: Ends, request: "Request13B", way: type[Granularity], layout: Layout, repeats: int
) -> tuple[int, dict[str, float]]:
    """Network calls, and seconds of each transport, of a copy and of as many messages of a bare group."""
    mapped, gloo = ends.sender("mapped"), ends.sender("gloo")
    by_mapped, by_gloo = (request.moves(way, layout, sender[0]) for sender in (mapped, gloo))
    num_calls, one = sum(move.num_calls for move in by_gloo), np.zeros(1, np.int64)
    calls = {
        "memcpy": lambda: ends.copy_s(request.num_bytes, one, one),
        "mapped": lambda: ends.carry_s(mapped, by_mapped),
        "raw gloo": lambda: ends.raw_s(request.num_bytes // num_calls, num_calls),
        "gloo": lambda: ends.carry_s(gloo, by_gloo),
    }
    return num_calls, in_turn(calls, repeats)


def fig11_figures(
    ends: Ends, num_layers: int, channels: Sequence[int], repeats: int, seed: int
) -> Iterator[TransferFigure]:
    """Fig. 11: one call a region against one call a block, by the number of channels. The ratio is of their rates."""
    request = Request13B(ends, num_layers, seed)
    for count in channels:
        sender = ends.sender("gloo", count)
        aggregated = request.moves(ByRequestAgg, AggregatedLayout(), sender[0])
        discrete = request.moves(ByRequest, DiscreteLayout(), sender[0])
        took = in_turn(
            {
                "aggregated": partial(ends.carry_s, sender, aggregated),
                "discrete": partial(ends.carry_s, sender, discrete),
            },
            repeats,
        )
        for name, moves in (("aggregated", aggregated), ("discrete", discrete)):
            paper = PAPER_AGGREGATED_MS / PAPER_DISCRETE_MS[count] if name == "discrete" else 1.0
            yield TransferFigure("fig11", f"{name}, {count} channels", request.num_bytes, moves[0].num_calls,
                                 took[name], "aggregated", took["aggregated"], paper=paper)  # fmt: skip


class Request13B:
    """Scattered blocks, at both ends, of a request whose KV has Llama2-13B's shape but for its number of layers.

    Raises ValueError when the memories are too small for it.
    """

    def __init__(self, ends: Ends, num_layers: int, seed: int) -> None:
        g = LLAMA2_13B
        self._geometry = CacheGeometry(num_layers, g.block_size, g.num_kv_heads, g.head_dim, g.dtype)
        self._room = len(ends.memory) // self._geometry.block_bytes
        if self._room < NUM_BLOCKS:
            raise ValueError(f"{num_layers} layers: {NUM_BLOCKS} blocks do not fit into {len(ends.memory)} bytes")
        rng = np.random.default_rng(seed)
        self._here, self._there = (rng.permutation(self._room)[:NUM_BLOCKS].astype(np.int32) for _ in range(2))
        self.num_bytes = NUM_BLOCKS * self._geometry.block_bytes

    def moves(self, way: type[Granularity], layout: Layout, endpoint: int) -> list[Move]:
        granularity = way(layout, self._geometry)
        here = End((endpoint, 0), self._room, self._here)
        there = End((RECEIVER, 0), self._room, self._there)
        layers: Sequence[int | None] = range(self._geometry.num_layers) if way is ByLayer else [None]
        return [move for layer in layers for move in granularity.moves(here, there, layer)]


def _scattered(endpoint: int, row_bytes: int, rows: np.ndarray, to: np.ndarray, *, packed: bool = False) -> Move:
    starts = np.zeros(1, np.int64) if packed else np.arange(len(rows))
    return Move((endpoint, 0), (RECEIVER, 0), row_bytes, rows, to, starts, packed)
