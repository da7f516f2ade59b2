"""Lifeline: rank 0's store, which a process of the cluster does not outlive; nor its torchrun (torchrun.py).

A thread that looks now and then, and sends its own process a SIGTERM.
"""

import logging
import os
import signal
import threading

from torch.distributed.distributed_c10d import Store

from memserve.cluster.mailbox import births_of
from memserve.cluster.roster import CONTROLLER
from memserve.cluster.torchrun import LOOK_S
from memserve.transfer.store import own_connection

_log = logging.getLogger("memserve")


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
        while not self._is_cut.wait(LOOK_S):
            try:
                self._store.check([births_of(CONTROLLER)])
            except RuntimeError as error:
                if not self._is_cut.is_set():
                    _log.error("rank 0 is gone: %s", error)
                    os.kill(os.getpid(), signal.SIGTERM)
                return
