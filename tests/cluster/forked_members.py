"""The members of a cluster, each started by itself, and started again when it fails, as a torchrun of its own does.

Forked from one process, as in forked_ranks.py, whose files these leave too: pids.json and codes.json are by rank, of
the latest processes. `sizes` are the ranks of each member, the scheduler's first.
"""

import json
import os
import signal
import time
import traceback
from contextlib import suppress
from datetime import timedelta

import torch
from child_process import free_port
from cluster import distributed_ranks
from cluster.forked_ranks import Forked, write
from forking import forking

from memserve import load_config
from memserve.cluster import launch, watch
from memserve.cluster.launch import RunOver

RESTARTS, PAUSE_S = 3, 0.5


class ForkedMembers(Forked):
    """The process that forks them, as a test sees it. pause_s: before a member is started again.

    abroad: for the scheduler, every process is on another host: it cannot look whether it is there.
    """

    def __init__(self, directory, words, sizes, *, pause_s=PAUSE_S, abroad=False):
        self.directory, self._num_ranks = directory, sum(sizes)
        self._parent = forking().Process(target=main, args=(directory, words, sizes, pause_s, abroad))
        self._parent.start()


class Member:
    """One of them, over all of its lives. ranks: of the cluster.  name: its word."""

    def __init__(self, directory, words, name, ranks, abroad):
        self.ranks, self.codes, self.pids = ranks, [None] * len(ranks), []
        self._directory, self._words, self._name, self._abroad = directory, words, name, abroad
        self._num_restarts = -1

    @property
    def may_start(self):
        return self._name != "scheduler" and self._num_restarts < RESTARTS

    def start(self):
        self._num_restarts += 1
        port = free_port()
        self.pids = [self._fork(part, port) for part in range(len(self.ranks))]

    def ended(self, pid, code):
        """One of its processes has; True if the member is to be started again, all of it."""
        self.codes[self.pids.index(pid)] = code
        if code == 0 or not self.may_start:
            return False
        for other, ended in zip(self.pids, self.codes, strict=True):
            if ended is None:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
        self.codes = [None] * len(self.ranks)
        return True

    def _fork(self, part, port):
        pid = os.fork()
        if pid:
            return pid
        printed = os.open(self._directory / f"printed-{self.ranks[part]}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        if self._name != "scheduler":
            place = {"RANK": part, "WORLD_SIZE": len(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                     "TORCHELASTIC_RESTART_COUNT": self._num_restarts}  # fmt: skip
            os.environ.update({name: str(value) for name, value in place.items()})
        code = 1
        launch._SOON = timedelta(seconds=2)  # all is on this host
        try:
            if self._abroad and self._name == "scheduler":
                watch.host_id = lambda: "elsewhere"
            cfg = load_config([*self._words, f"cluster.member={self._name}"])
            distributed_ranks.play([(cfg, None)], self._directory / "found.json")
            code = 0
        except RunOver:  # as run.py does: there is nothing to start again for
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def main(directory, words, sizes, pause_s, abroad):
    torch.set_num_threads(1)
    words = [*words, f"cluster.store=127.0.0.1:{free_port()}"]
    members, first = [], 0
    for number, size in enumerate(sizes):
        name = str(number - 1) if number else "scheduler"
        members.append(Member(directory, words, name, range(first, first + size), abroad))
        first += size
    for member in members:
        member.start()
    report(directory, members)
    while any(None in member.codes for member in members):
        pid, status = os.wait()
        (member,) = [member for member in members if pid in member.pids]
        if member.ended(pid, os.waitstatus_to_exitcode(status)):
            time.sleep(pause_s)
            member.start()
        report(directory, members)


def report(directory, members):
    write(directory / "pids.json", [pid for member in members for pid in member.pids])
    write(directory / "codes.json", [code for member in members for code in member.codes])


def log_of(directory, rank):
    with suppress(FileNotFoundError):
        return (directory / f"found.json.rank-{rank}.log").read_text()
    return ""


def found(directory):
    return json.loads((directory / "found.json").read_text())
