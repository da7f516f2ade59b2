"""A Python process of its own, for what is decided when one starts: Triton's interpreter, or a stand-in for a GPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from memserve.jit import tl

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(tl is None, reason="triton is not installed: it is for Linux on x86-64, by pip")


def own_environment(*folders: Path, **more: str) -> dict[str, str]:
    """Of a child that imports from `folders` and from this checkout; and from where this process was told to, since a
    GPU's machine may have its packages there.
    """
    told = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, map(str, (*folders, ROOT, told))))
    return {**os.environ, "PYTHONPATH": path, **more}


def free_port() -> int:
    """Of this host, for somebody who listens there at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def run_child(command: list[str], *folders: Path, **environment: str) -> str:
    """What it prints; fails with the end of that if it fails."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=own_environment(*folders, **environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def run_interpreted(*words: str) -> None:
    """Tests by pytest's words, under Triton's interpreter; none may be skipped."""
    said = run_child(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "fast_interpreter", *words],
        ROOT / "tests", TRITON_INTERPRET="1",
    )  # fmt: skip
    assert " passed" in said and "skipped" not in said


def run_on_stand_in(*words: str) -> None:
    """The same with a stand-in for a GPU (tests/stand_in/)."""
    run_interpreted("-p", "stand_in.plugin", *words)
