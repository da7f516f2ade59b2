"""Clock: the one module that reads the machine's time. Everyone else is given `now_ns`.

Times are integer nanoseconds throughout memserve: integer sums are exact, so a run of n decode steps settled at once
ends at the very nanosecond at which n single steps would have ended. Reports convert to seconds at their edge.
"""

import time
from datetime import UTC, datetime, timedelta

NS_PER_S = 1_000_000_000
MAX_NS = 2**62  # 146 years; an int64 leaves as many to what comes after
MAX_S = MAX_NS / NS_PER_S
LONGEST_S = 1e9  # 31 years: the longest duration that an option may name, so that a few of them stay below MAX_S


def earliest(*times_ns: int | None) -> int | None:
    """The first of some times, of which those that are None never come."""
    return min((time_ns for time_ns in times_ns if time_ns is not None), default=None)


def to_ns(seconds: float) -> int:
    """Seconds to integer nanoseconds, rounded to the nearest. Raises ValueError beyond what the clock can tell."""
    if not abs(seconds) <= MAX_S:
        raise ValueError(f"{seconds} s, by the cost_model, the link or the workload: expected at most 146 years")
    return round(seconds * NS_PER_S)


def to_s(nanoseconds: int) -> float:
    """Integer nanoseconds to seconds."""
    return nanoseconds / NS_PER_S


def date_ns(text: str) -> int:
    """Nanoseconds since 1970 of a date and time in ISO 8601, to the microsecond; one without an offset is in UTC.

    Raises ValueError for what is none.
    """
    date = datetime.fromisoformat(text)
    date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return (date - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000


def monotonic_ns() -> int:
    """Monotonic machine time in nanoseconds; only differences mean anything."""
    return time.perf_counter_ns()


def wall_time_s() -> float:
    """Seconds since the Unix epoch, for provenance records."""
    return time.time()


class Stopwatch:
    """Measures one step's duration, leaving out what runs while it is paused (an emulated block copy, say)."""

    def __init__(self) -> None:
        self._elapsed_ns = 0
        self._started_ns = monotonic_ns()

    def pause(self) -> None:
        self._elapsed_ns += monotonic_ns() - self._started_ns

    def resume(self) -> None:
        self._started_ns = monotonic_ns()

    def elapsed_ns(self) -> int:
        """Nanoseconds so far, pauses left out; while it runs."""
        return self._elapsed_ns + monotonic_ns() - self._started_ns

    def stop_ns(self) -> int:
        """Nanoseconds measured since construction, pauses left out."""
        self.pause()
        return self._elapsed_ns
