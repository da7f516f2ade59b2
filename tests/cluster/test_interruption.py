"""A signal ends a process of the cluster, wherever in Python it comes."""

import signal
import sys
import threading
import weakref

import pytest

from memserve.cluster.interruption import Interrupted, heed_signals


class Item:
    pass


@pytest.fixture(autouse=True)
def own_handlers():
    """What a test sets is put back."""
    handlers, hook = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}, sys.unraisablehook
    yield
    sys.unraisablehook = hook
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_midst_of_a_callback_whose_exceptions_are_dropped_comes_again(signum):
    heed_signals(has_nothing=False)
    item = Item()
    reference = weakref.ref(item, lambda _: signal.raise_signal(signum))
    with pytest.raises(Interrupted, match=f"interrupted by {signum.name}"):
        del item
        threading.Event().wait(5.0)
    assert reference() is None and signal.getsignal(signum) == signal.SIG_IGN
