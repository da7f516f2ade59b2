"""Ranks: starts a program as the ranks of a gloo group, real processes, and waits for them within a hard limit."""

import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TESTS = Path(__file__).resolve().parents[1]
LIMIT_S = 100  # a process that takes longer is killed


@dataclass(frozen=True)
class Ended:
    """How a rank ended. returncode is negative for a signal."""

    returncode: int
    output: str


def launch(program: str, size: int, directory: Path, *args: str) -> list[Ended]:
    """Runs tests/`program` as `size` ranks that meet in `directory`; each is given rank, size, `directory`, `args`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "model")))}
    logs = [(directory / f"rank-{rank}.log").open("w+") for rank in range(size)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / program), str(rank), str(size), str(directory), *args],
            stdout=log,
            stderr=log,
            env=environment,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    return [Ended(code, (directory / f"rank-{rank}.log").read_text()) for rank, code in enumerate(codes)]


def join(rank: int, size: int, directory: Path) -> None:
    """What each rank does first."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
