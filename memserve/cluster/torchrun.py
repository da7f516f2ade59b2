"""Torchrun: what started this process, if it was that. Imports nothing that takes time: it is looked at first of all.

A torchrun that is killed leaves its ranks, and who has it for a parent does not know it afterwards: its number is to be
taken before the seconds that a rank takes to start.
"""

import logging
import os
import signal
import threading
from collections.abc import Mapping

LOOK_S = 0.5
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
            end_with(self._process, "torchrun")


NO_TORCHRUN = Torchrun(None)


def own_torchrun(environment: Mapping[str, str]) -> Torchrun:
    """What started this process, if it was torchrun, as its environment says."""
    return Torchrun(os.getppid()) if "TORCHELASTIC_RUN_ID" in environment else NO_TORCHRUN


def end_with(process: int, name: str) -> None:
    """Once the process that started this one is gone, this one gets a SIGTERM. name: of the other, for the log."""
    threading.Thread(target=_outlive, args=(process, name), name=f"{name}'s end", daemon=True).start()


def _outlive(process: int, name: str) -> None:
    while os.getppid() == process:
        threading.Event().wait(LOOK_S)
    _log.error("%s, process %d, is gone", name, process)
    os.kill(os.getpid(), signal.SIGTERM)
