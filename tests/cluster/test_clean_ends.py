"""A run that is interrupted leaves nothing behind, and says so, whoever was told to end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from child_process import free_port, own_environment
from cluster.test_distributed import TESTS, WORKLOAD

from memserve.cluster import distributed
from memserve.cluster.interruption import Interrupted
from memserve.cluster.turnover import InstanceFailed
from memserve.transfer.liveness import Watched

LONG = [*WORKLOAD, "workload.num_sessions=500", "workload.rate=1"]
SPLIT = ["model=tiny", "transport=gloo", "cluster=colocated_1", "cluster.tensor_parallel.colocated=2"]
WHOLE = ["tokens=hash", "transport=mapped", "cluster=colocated_1"]
STARTS_S, ENDS_S = 150.0, 60.0

pytestmark = pytest.mark.timeout(300)  # real processes, beside whatever else the machine does


def wait_until(is_so, limit_s, what):
    until = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < until, f"not within {limit_s} s: {what()}"
        time.sleep(0.1)


def children(pid):
    """{process number: its environment} of a process's children."""
    numbers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(number): Path(f"/proc/{number}/environ").read_bytes() for number in numbers}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc, as transport=mapped does")
@pytest.mark.parametrize(
    ("signum", "to", "words"),
    [(signal.SIGINT, "torchrun", WHOLE), (signal.SIGTERM, "rank 0", WHOLE), (signal.SIGKILL, "torchrun", SPLIT)],
)
def test_an_interrupted_run_leaves_no_process_and_no_shared_memory_and_says_so(signum, to, words, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(2 + (words is SPLIT)),
    ]
    command += [str(TESTS.parent / "scripts" / "run.py"), "exec=distributed", "model.num_threads=1", *words, *LONG]
    printed, own = tmp_path / "printed", own_environment()
    with printed.open("wb") as out:
        run = subprocess.Popen([*command, f"hydra.run.dir={tmp_path}"], stdout=out, stderr=out, env=own)
    try:
        log = tmp_path / "rank-1.log"
        wait_until(lambda: log.exists() and "starts" in log.read_text(), STARTS_S, printed.read_text)
        time.sleep(1.0)
        ranks = children(run.pid)
        (first,) = [pid for pid, environment in ranks.items() if b"\0RANK=0\0" in environment]
        os.kill(run.pid if to == "torchrun" else first, signum)
        wait_until(lambda: run.poll() is not None, ENDS_S, printed.read_text)
        wait_until(lambda: all(Watched(pid).is_gone for pid in ranks), 10.0, printed.read_text)
    finally:
        run.kill()
        run.wait()
    assert run.returncode != 0
    named = "SIGTERM" if signum == signal.SIGKILL else signum.name  # which a rank that torchrun leaves sends itself
    assert f"error: interrupted by {named}" in printed.read_text()
    assert not (tmp_path / "report.json").exists()
    marks = ["memserve", *map(str, [run.pid, *ranks])]
    assert not [path for path in Path("/dev/shm").iterdir() if any(mark in path.name for mark in marks)]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc, to find what torchrun has started")
def test_ranks_whose_torchrun_is_killed_while_they_start_end_too(tmp_path):
    """They have met nobody yet, and would wait for each other."""
    script = str(TESTS.parent / "scripts" / "run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    words = ["exec=distributed", "model.num_threads=1", *WHOLE, *LONG, f"hydra.run.dir={tmp_path}"]
    printed = tmp_path / "printed"
    with printed.open("wb") as out:
        run = subprocess.Popen([*command, *words], stdout=out, stderr=out, env=own_environment())
    ranks = {}
    try:
        wait_until(lambda: len(children(run.pid)) == 2, STARTS_S, printed.read_text)
        ranks = children(run.pid)
        tasks = [Path(f"/proc/{pid}/task") for pid in ranks]
        wait_until(lambda: all(len(list(task.iterdir())) > 1 for task in tasks), STARTS_S, printed.read_text)
        run.kill()
        run.wait()
        wait_until(lambda: all(Watched(pid).is_gone for pid in ranks), 30.0, printed.read_text)
    finally:
        run.kill()
        for pid in ranks:
            if not Watched(pid).is_gone:
                os.kill(pid, signal.SIGKILL)


def test_a_member_that_waits_for_the_scheduler_ends_on_ctrl_c(tmp_path):
    words = ["exec=distributed", *WHOLE, f"cluster.store=127.0.0.1:{free_port()}", "cluster.member=0"]
    command = [sys.executable, str(TESTS.parent / "scripts" / "run.py"), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=own_environment(), cwd=tmp_path) as run:
        try:
            assert run.stdout is not None and "looks for the scheduler at 127.0.0.1" in run.stdout.readline()
            time.sleep(1.0)  # it waits below Python by now
            run.send_signal(signal.SIGINT)
            assert run.wait(ENDS_S) == -signal.SIGINT
        finally:
            run.kill()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("torchrun_is_gone", [False, True])
def test_instances_that_end_because_torchrun_is_gone_are_no_failure_of_theirs(torchrun_is_gone, monkeypatch) -> None:
    """They may notice before rank 0 does."""
    cluster = object.__new__(distributed.DistributedCluster)
    cluster._mailbox = SimpleNamespace(close=lambda: None)
    cluster._torchrun = SimpleNamespace(is_gone=torchrun_is_gone)

    def play(progress: object) -> None:
        raise InstanceFailed("every instance is gone")

    def leave(signum: int) -> None:
        raise Interrupted(signum)

    monkeypatch.setattr(cluster, "_heed_signals", lambda: None)
    monkeypatch.setattr(cluster, "play", play)
    monkeypatch.setattr(distributed, "leave", leave)
    with pytest.raises(Interrupted if torchrun_is_gone else InstanceFailed):
        cluster.run()
