"""Activity: what an instance did when: its steps, and the transfers that it sent; activity.jsonl. Knows no picture.

An instance has a track for its steps and one for each instance that it sends to. A track keeps at most MAX_SPANS spans:
when it is full, neighbours are joined in pairs, so a long run is told more coarsely and nothing is left out.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from memserve.clock import to_s
from memserve.kvcache.ticket import Sent
from memserve.request import ScheduledBatch

MAX_SPANS = 10_000
STEPS = -1  # the track of an instance's own steps; others are numbered by whom they lead to


class Track(msgspec.Struct, frozen=True):
    """The spans of one track, [n] each. peer: the instance that is sent to, or STEPS.

    counts: how many steps or transfers a span stands for.  lasted_ns: how long these took together.  figures: what they
    add up to, by name.
    """

    peer: int
    starts_ns: list[int]
    ends_ns: list[int]
    lasted_ns: list[int]
    counts: list[int]
    figures: dict[str, list[int]]


@dataclass(frozen=True)
class ActivitySpan:
    """`count` steps of an instance (to: ""), or transfers from it, and what they add up to."""

    instance: str
    to: str
    start_s: float
    end_s: float
    count: int
    figures: dict[str, int]


class Activity:
    """The tracks of one instance."""

    def __init__(self, max_spans: int = MAX_SPANS) -> None:
        if max_spans < 2:
            raise ValueError(f"max_spans={max_spans}: expected an integer >= 2")
        self._max_spans = max_spans
        self._tracks: dict[int, Track] = {}

    def step(self, batch: ScheduledBatch, start_ns: int, end_ns: int) -> None:
        """A batch that has been computed and not committed yet."""
        computed = zip(batch.requests, batch.num_new, strict=True)
        num_prefill = sum(num_new for request, num_new in computed if request.num_computed < request.prefill_end)
        figures = {
            "requests": len(batch.requests),
            "prefill_tokens": num_prefill,
            "decode_tokens": batch.num_tokens - num_prefill,
            "swapped_blocks": batch.num_swapped_blocks,
        }
        self._add(STEPS, start_ns, end_ns, batch.num_steps, figures)

    def sent(self, transfers: Iterable[Sent]) -> None:
        """Transfers that have ended."""
        for t in transfers:
            self._add(t.peer, t.begun_ns, t.ended_ns, 1, {"tokens": t.num_tokens, "bytes": t.num_bytes})

    def tracks(self) -> list[Track]:
        """Everything kept."""
        return list(self._tracks.values())

    def _add(self, peer: int, start_ns: int, end_ns: int, count: int, figures: dict[str, int]) -> None:
        track = self._tracks.get(peer)
        if track is None:
            track = self._tracks[peer] = Track(peer, [], [], [], [], {name: [] for name in figures})
        elif len(track.counts) == self._max_spans:
            track = self._tracks[peer] = _joined_in_pairs(track)
        track.starts_ns.append(start_ns)
        track.ends_ns.append(end_ns)
        track.lasted_ns.append(end_ns - start_ns)
        track.counts.append(count)
        for name, figure in figures.items():
            track.figures[name].append(figure)


def _joined_in_pairs(track: Track) -> Track:
    def pairs(of: Callable[[list[int]], int], values: list[int]) -> list[int]:
        return [of(values[i : i + 2]) for i in range(0, len(values), 2)]

    return Track(
        track.peer,
        pairs(min, track.starts_ns),  # by layer a transfer may end before one that began earlier
        pairs(max, track.ends_ns),
        pairs(sum, track.lasted_ns),
        pairs(sum, track.counts),
        {name: pairs(sum, values) for name, values in track.figures.items()},
    )


def steps_outside_ns(tracks: Iterable[Track], since_ns: int, until_ns: int) -> int:
    """How long an instance's steps took before `since_ns` and after `until_ns`. Of a span that several were joined to
    and that one of them cuts, as much as is outside for sure: they may have been anywhere in it.
    """
    spans = [
        (start_ns, end_ns, lasted_ns)
        for track in tracks
        if track.peer == STEPS
        for start_ns, end_ns, lasted_ns in zip(track.starts_ns, track.ends_ns, track.lasted_ns, strict=True)
        if start_ns < since_ns or end_ns > until_ns
    ]
    inside = (max(min(end_ns, until_ns) - max(start_ns, since_ns), 0) for start_ns, end_ns, _ in spans)
    return sum(max(lasted_ns - there_ns, 0) for (*_, lasted_ns), there_ns in zip(spans, inside, strict=True))


def spans_of(instance: str, tracks: Iterable[Track], labels: Sequence[str]) -> Iterator[ActivitySpan]:
    """The spans of one instance's tracks; labels: of all instances, by their numbers."""
    for track in tracks:
        to = "" if track.peer == STEPS else labels[track.peer]
        names = list(track.figures)
        rows = zip(track.starts_ns, track.ends_ns, track.counts, *track.figures.values(), strict=True)
        for start_ns, end_ns, count, *figures in rows:
            yield ActivitySpan(
                instance, to, to_s(start_ns), to_s(end_ns), count, dict(zip(names, figures, strict=True))
            )


def activity_lines(spans: Iterable[ActivitySpan]) -> Iterator[str]:
    """The lines of activity.jsonl, each with its line end."""
    for span in spans:
        yield json.dumps(vars(span), ensure_ascii=False, allow_nan=False) + "\n"


def load_activity(directory: Path | str) -> list[ActivitySpan]:
    """The spans in a run's output directory. Raises OSError if it has no activity.jsonl."""
    text = (Path(directory) / "activity.jsonl").read_text(encoding="utf-8")
    return [ActivitySpan(**json.loads(line)) for line in text.splitlines()]
