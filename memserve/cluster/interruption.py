"""Interruption: what SIGINT and SIGTERM do to a process of the cluster. Knows no message and no rank.

while it waits for others in a store     they end it: no handler runs below Python, and it has nothing yet
while it is a part of the cluster        Interrupted is raised in it, once
while it waits for a process it started  SIGTERM raises Interrupted too, so that the other is not left alone
while an LLM changes its books           SIGINT waits until it has, since what was half done would stay so
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SOON_S = 0.01


class Interrupted(BaseException):
    """SIGINT or SIGTERM has come; no Exception, so that nobody takes it for a failure of what it interrupts."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum, self.status = signum, 128 + signum


def leave(signum: int, frame: FrameType | None = None) -> None:
    """Once: a terminal and torchrun both send one, and what is cleaned up meanwhile is not to be left half-way.

    Where it comes in the midst of a `__del__` or a weak reference's callback, whose exceptions Python drops, it comes
    again soon.
    """
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    before = sys.unraisablehook

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        if not isinstance(what.exc_value, Interrupted):
            before(what)
            return
        sys.unraisablehook = before
        for each in _SIGNALS:
            signal.signal(each, leave)
        threading.Timer(_SOON_S, os.kill, (os.getpid(), what.exc_value.signum)).start()

    sys.unraisablehook = dropped
    raise Interrupted(signum)


def heed_signals(*, has_nothing: bool) -> None:
    """From now on they raise Interrupted. has_nothing: to clean up, so that they just end the process."""
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_DFL if has_nothing else leave)


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Meanwhile they just end the process, but for one that is ignored: of a background job, say."""
    if threading.current_thread() is not threading.main_thread():
        yield  # which handles none
        return
    before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    heeded = {signum: handler for signum, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for signum in heeded:
        signal.signal(signum, signal.SIG_DFL)
    try:
        yield
    finally:
        for signum, handler in heeded.items():
            signal.signal(signum, handler)


@contextmanager
def raised_on_sigterm() -> Iterator[None]:
    """Meanwhile SIGTERM raises Interrupted, unless it is ignored."""
    in_a_thread = threading.current_thread() is not threading.main_thread()
    if in_a_thread or signal.getsignal(signal.SIGTERM) in (signal.SIG_IGN, None):
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def sigint_held_back() -> Iterator[None]:
    """Meanwhile SIGINT waits, where a handler of Python's would raise in the midst of this; then that handler runs."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came = list[FrameType | None]()
    signal.signal(signal.SIGINT, lambda _, frame: came.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(signal.SIGINT, came[-1])
