"""Point: a sweep's child process, which runs a script, or torchrun, and ends soon after a sweep that is killed.

    python -m memserve.cluster.point SWEEP scripts/run.py WORD ..                      SWEEP: its process number
    python -m memserve.cluster.point SWEEP -m torch.distributed.run .. scripts/run.py WORD ..

Imports nothing that takes time, as torchrun.py.
"""

import runpy
import sys
from pathlib import Path

from memserve.cluster.torchrun import end_with


def main() -> None:
    """Runs the command as Python itself would, in this process."""
    _, sweep, *command = sys.argv
    end_with(int(sweep), "the sweep")
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
