"""Liveness: whether a process of this host still runs. Proof of death, never of life; silence proves nothing."""

import os
from pathlib import Path

_STATE, _STARTED = 0, 19  # of the fields after the command's name in /proc/PID/stat


class Watched:
    """A process by its number and the moment it was started, so that a number used again is not mistaken for it.

    started: what `started_at` has said of it in its own process; by default what it says now.
    """

    def __init__(self, pid: int, started: str | None = None) -> None:
        self._pid = pid
        self._started = started_at(pid) if started is None else started

    @property
    def is_gone(self) -> bool:
        """True once it has ended, whether or not its parent has noticed; a stopped one is still there."""
        fields = _stat(self._pid)
        return not fields or fields[_STATE] in "ZX" or fields[_STARTED] != self._started


def started_at(pid: int) -> str:
    """When a process was started, in the system's ticks; "" where there is none."""
    fields = _stat(pid)
    return fields[_STARTED] if fields else ""


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name; none where there is no such process."""
    try:
        return _read(f"/proc/{pid}/stat").rpartition(b")")[2].decode().split()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return []
        try:
            os.kill(pid, 0)  # a system without /proc: whether there is such a process has to do
        except ProcessLookupError:
            return []
        return ["R"] + ["0"] * _STARTED


def _read(path: str) -> bytes:
    """A short file at once: before each copy it is read, and by Path that takes three times as long."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, 4096)
    finally:
        os.close(file)
