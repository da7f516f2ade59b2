"""Lifelines: what a process of the cluster does not outlive: the torchrun that started it, and rank 0's store.

Each is a thread that looks now and then, and sends its own process a SIGTERM.
"""

import logging
import os
import signal
import threading

from torch.distributed.distributed_c10d import Store

from memserve.cluster.mailbox import births_of
from memserve.cluster.roster import CONTROLLER
from memserve.transfer.store import own_connection

_LOOK_S = 0.5
_log = logging.getLogger("memserve")


class Torchrun:
    """What started this process. Knows when it is gone: killed, without ending its ranks.

    process: its number; None for a rank that was started without it, which may outlive who started it.
    """

    def __init__(self, process: int | None) -> None:
        self._process = process

    @property
    def is_gone(self) -> bool:
        return self._process is not None and os.getppid() != self._process

    def end_with(self) -> None:
        """Once it is gone, this process gets a SIGTERM."""
        if self._process is not None:
            threading.Thread(target=self._outlive, name="torchrun's end", daemon=True).start()

    def _outlive(self) -> None:
        while not self.is_gone:
            threading.Event().wait(_LOOK_S)
        _log.error("torchrun, process %d, is gone", self._process)
        os.kill(os.getpid(), signal.SIGTERM)


class StoreLine:
    """The store, a part of rank 0's process: once it does not answer, and `cut` was not called, a SIGTERM comes."""

    def __init__(self, store: Store) -> None:
        self._store = own_connection(store)
        self._is_cut = threading.Event()
        threading.Thread(target=self._outlive, name="rank 0's end", daemon=True).start()

    def cut(self) -> None:
        """Rank 0 may end now."""
        self._is_cut.set()

    def _outlive(self) -> None:
        while not self._is_cut.wait(_LOOK_S):
            try:
                self._store.check([births_of(CONTROLLER)])
            except RuntimeError as error:
                if not self._is_cut.is_set():
                    _log.error("rank 0 is gone: %s", error)
                    os.kill(os.getpid(), signal.SIGTERM)
                return
