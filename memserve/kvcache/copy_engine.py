"""Copy engines: how the contents of blocks get from one medium to the other, and when. Decides nothing.

    engine.start(source, target, now_ns) -> Copy    source and target stay held by whoever started it until
    copy.has_ended(now_ns), or copy.finish()        the contents are at `target`

`AtOnce` returns when it is done. `OnAThread` copies beside compute, on a CPU and on a GPU. `InVirtualTime` is for
clusters whose time is not the machine's.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from memserve.clock import Stopwatch, to_ns
from memserve.transfer.side_stream import beside


class BlockCopier(ABC):
    """Moves the contents of blocks (int32 [n]) to others, within a medium or across. device: what HBM is."""

    device: torch.device = torch.device("cpu")

    @abstractmethod
    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copies; done when it returns."""


class NothingToCopy(BlockCopier):
    """For pools that only count: there is no memory behind the blocks."""

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copies nothing."""


class Copy(ABC):
    """Contents on their way. due_ns: when it will have ended; None if nobody can say."""

    due_ns: int | None = None

    @abstractmethod
    def has_ended(self, now_ns: int) -> bool:
        """Whether `finish` need not wait."""

    @abstractmethod
    def finish(self) -> None:
        """Waits until the contents are there. Raises what the copy failed with: nothing is written any more then."""


class CopyEngine(ABC):
    """Starts copies; they end in the order in which they were started.

    waited_ns: on the machine's clock, how long those who started copies have waited in `start`.
    """

    waited_ns: int = 0

    @abstractmethod
    def start(self, source: np.ndarray, target: np.ndarray, now_ns: int) -> Copy:
        """Copies blocks `source` to `target`, int32 [n] each. What raises writes nothing any more."""


def made_by(engine: Callable[[BlockCopier], CopyEngine], copier: BlockCopier) -> CopyEngine:
    """The engine that `engine` makes of a copier. Raises ValueError where that is none."""
    if not callable(engine):
        raise ValueError(f"engine={engine!r}: expected what makes a CopyEngine, such as the class AtOnce")
    made: object = engine(copier)
    if not isinstance(made, CopyEngine):
        raise ValueError(f"engine={engine!r} made {made!r}: expected a CopyEngine")
    return made


class _Ended(Copy):
    def has_ended(self, now_ns: int) -> bool:
        return True

    def finish(self) -> None:
        """Nothing is left to do."""


NOTHING_TO_WAIT_FOR = _Ended()


class AtOnce(CopyEngine):
    """Whoever starts a copy waits for it."""

    def __init__(self, copier: BlockCopier) -> None:
        self._copier = copier

    def start(self, source: np.ndarray, target: np.ndarray, now_ns: int) -> Copy:
        watch = Stopwatch()
        self._copier.copy(source, target)
        self.waited_ns += watch.stop_ns()
        return NOTHING_TO_WAIT_FOR


class _Promised(Copy):
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def has_ended(self, now_ns: int) -> bool:
        return self._future.done()

    def finish(self) -> None:
        self._future.result()


class OnAThread(CopyEngine):
    """Copies one after another on a thread of its own, on a GPU on a stream of its own, beside whatever computes.

    A copy begins when everything has ended that its caller's stream had been given before: KV is not read before it
    is written, nor written where a kernel still reads.
    """

    def __init__(self, copier: BlockCopier) -> None:
        self._copier = copier
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="swap")
        self._side = beside(copier.device)

    def start(self, source: np.ndarray, target: np.ndarray, now_ns: int) -> Copy:
        return _Promised(self._worker.submit(self._copy, self._side.mark(), source, target))

    def _copy(self, written: torch.cuda.Event | None, source: np.ndarray, target: np.ndarray) -> None:
        with self._side.after(written):
            self._copier.copy(source, target)


class _Due(Copy):
    def __init__(self, copy: Callable[[], None], due_ns: int) -> None:
        self._copy, self.due_ns = copy, due_ns

    def has_ended(self, now_ns: int) -> bool:
        assert self.due_ns is not None
        return now_ns >= self.due_ns

    def finish(self) -> None:
        self._copy()


class InVirtualTime(CopyEngine):
    """Copies one after another on a link that takes seconds_for(number of blocks); the bytes move when one ends."""

    def __init__(self, copier: BlockCopier, seconds_for: Callable[[int], float]) -> None:
        self._copier, self._seconds_for = copier, seconds_for
        self._free_ns = 0

    def start(self, source: np.ndarray, target: np.ndarray, now_ns: int) -> Copy:
        self._free_ns = max(now_ns, self._free_ns) + to_ns(self._seconds_for(len(source)))
        return _Due(lambda: self._copier.copy(source, target), self._free_ns)
