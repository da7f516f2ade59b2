"""Ranks: runs a function as the ranks of a gloo group, real processes, and waits for them within a hard limit."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from forking import forking

LIMIT_S = 100  # a process that takes longer is killed


@dataclass(frozen=True)
class Ended:
    """How a rank ended. returncode is negative for a signal."""

    returncode: int | None
    output: str


def launch(program: Callable[..., None], size: int, directory: Path, *args: object) -> list[Ended]:
    """Runs `program` as `size` ranks that meet in `directory`; each is given rank, size, `directory`, `args`."""
    logs = [directory / f"rank-{rank}.log" for rank in range(size)]
    processes = [
        forking().Process(target=_rank, args=(log, program, rank, size, directory, *args))
        for rank, log in enumerate(logs)
    ]
    until = time.monotonic() + LIMIT_S
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [Ended(process.exitcode, log.read_text()) for process, log in zip(processes, logs, strict=True)]


def _rank(log: Path, program: Callable[..., None], *args: object) -> None:
    printed = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    program(*args)


def join(rank: int, size: int, directory: Path) -> None:
    """What each rank does first."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
