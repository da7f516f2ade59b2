"""The ranks of a cluster, forked from one process that has imported everything: many times quicker than each by itself.

That process is given the number of ranks, the cases, [(words, world size), ..], and a directory. There it leaves
found.json of distributed_ranks.py, what each rank printed, their process numbers in pids.json, and their exit codes,
null while they run, in codes.json.
"""

import json
import os
import signal
import traceback
from contextlib import suppress

import torch
from child_process import free_port
from cluster import distributed_ranks
from forking import forking

from memserve import load_config


class Forked:
    """The process that forks them, as a test sees it."""

    def __init__(self, directory, cases, num_ranks):
        self.directory, self._num_ranks = directory, num_ranks
        self._parent = forking().Process(target=main, args=(num_ranks, cases, directory))
        self._parent.start()

    def pids(self):
        return json.loads((self.directory / "pids.json").read_text())

    def ended(self):
        return not self._parent.is_alive()

    def codes(self):
        """Exit codes by rank, negative for a signal; None while it runs."""
        codes = self.directory / "codes.json"
        return json.loads(codes.read_text()) if codes.exists() else [None] * self._num_ranks

    def signal(self, rank, signum):
        """To a rank; one that has ended gets it no more."""
        with suppress(ProcessLookupError):
            os.kill(self.pids()[rank], signum)

    def printed(self):
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.directory.glob("printed-*")))

    def kill(self):
        """Whoever is left."""
        if self._parent.is_alive() and (self.directory / "pids.json").exists():
            for pid, code in zip(self.pids(), self.codes(), strict=True):
                if code is None:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        self._parent.kill()
        self._parent.join()


def fork_rank(rank, num_ranks, port, cases, directory):
    """Returns the process number; the child never returns."""
    pid = os.fork()
    if pid:
        return pid
    printed = os.open(directory / f"printed-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    os.environ.update({name: str(value) for name, value in place.items()})
    code = 1
    try:
        distributed_ranks.play(cases, directory / "found.json")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main(num_ranks, cases, directory):
    torch.set_num_threads(1)
    composed = [(load_config(words), world_size) for words, world_size in cases]
    port = free_port()
    pids = [fork_rank(rank, num_ranks, port, composed, directory) for rank in range(num_ranks)]
    write(directory / "pids.json", pids)
    codes = [None] * num_ranks
    while None in codes:
        pid, status = os.wait()
        codes[pids.index(pid)] = os.waitstatus_to_exitcode(status)
        write(directory / "codes.json", codes)


def write(path, value):
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)
