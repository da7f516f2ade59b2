"""Members of a cluster, each started by itself: one that fails is started again and rejoins; no answer is lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from child_process import free_port, own_environment
from cluster import test_tensor_parallel
from cluster.forked_members import ForkedMembers, found, log_of
from cluster.survival import LIMIT_S, START_S, wait_for
from cluster.test_clean_ends import children, wait_until
from cluster.test_distributed import TESTS
from cluster.test_distributed_membership import DISTRIBUTED, WORKLOAD, expected
from cluster.test_split_faults import LASTING

PATIENT = [*DISTRIBUTED, *WORKLOAD, "cluster.patience_s=60"]
PD = ["cluster=1p1d", "mode=pd_caching_3", "index_source=exact", "policy=prompt_tree"]
CASES = {
    "the only decode instance": (2, [*PD, "transport=gloo", "granularity=by_layer"]),
    "the only prefill instance": (1, [*PD, "transport=mapped", "granularity=by_request"]),
    "the only instance": (1, ["cluster=colocated_1", "transport=mapped"]),
}

pytestmark = pytest.mark.timeout(240)  # real processes, beside whatever else the machine does


def wait_for_start(members, leaders):
    wait_for(
        lambda: all("starts" in log_of(members.directory, rank) for rank in leaders), START_S, "it starts", members
    )


def play(members, leaders, act):
    """What rank 0 found in each run, after all members have ended well. act: what befalls them once it has begun."""
    try:
        wait_for_start(members, leaders)
        act()
        wait_for(members.ended, LIMIT_S, "the run ends", members)
    finally:
        members.kill()
    assert set(members.codes()) == {0}, members.printed()
    return found(members.directory)


@pytest.mark.parametrize("name", CASES)
def test_who_was_killed_is_started_again_and_rejoins_and_every_request_is_answered_right(name, tmp_path):
    victim, words = CASES[name]
    num_instances = 1 if "cluster=colocated_1" in words else 2
    members = ForkedMembers(tmp_path, [*PATIENT, *words, "repeats=2"], [1] * (1 + num_instances))

    def kill():
        members.signal(victim, signal.SIGKILL)

    first, second = play(members, range(1, 1 + num_instances), kill)
    for result in (first, second):
        assert result["tokens"] == expected()
        assert result["report"]["num_failed"] == result["report"]["quarantined_blocks"] == 0
    counts = {key: first["report"]["membership"][key] for key in ("joined", "left", "lost", "switched")}
    assert counts == {"joined": 1, "left": 0, "lost": 1, "switched": 0}
    assert second["report"]["membership"]["lost"] == 0 and second["missing"] == {}
    assert [row["joined_s"] > 0 for row in first["report"]["instances"]].count(True) == 1


def test_a_new_process_is_proof_that_the_one_before_is_gone_where_nobody_can_look(tmp_path):
    words = [*PATIENT, *PD, "transport=gloo", "cluster.silence_s=1"]
    members = ForkedMembers(tmp_path, words, [1, 1, 1], pause_s=3.0, abroad=True)

    def kill():
        members.signal(2, signal.SIGKILL)
        wait_for(lambda: "decode-1 is silent" in log_of(tmp_path, 0), 30, "it is missed", members)

    (result,) = play(members, (1, 2), kill)
    log = log_of(tmp_path, 0)
    order = ["decode-1 is silent", "decode-1 is gone", "rank 2 is there again", "decode-2 has joined"]
    assert sorted(order, key=log.index) == order
    assert result["tokens"] == expected() and result["report"]["quarantined_blocks"] == 0
    assert result["missing"] == {"decode-1": "gone"}


def test_members_end_when_the_scheduler_is_killed(tmp_path):
    members = ForkedMembers(tmp_path, [*PATIENT, "cluster=colocated_2", "transport=mapped"], [1, 1, 1])
    try:
        wait_for_start(members, (1, 2))
        pids = members.pids()
        members.signal(0, signal.SIGKILL)
        wait_for(members.ended, LIMIT_S, "all end", members)
    finally:
        members.kill()
    assert members.codes()[0] == -signal.SIGKILL
    assert not [path for path in Path("/dev/shm").iterdir() if any(str(pid) in path.name for pid in pids)]


def test_who_ends_by_an_error_of_its_own_is_started_again_too(tmp_path):
    words = [*PATIENT, "workload.rate=2", "cluster=colocated_2", "transport=gloo"]
    words += ["queue._target_=cluster.failing.FailsOnce"]
    words += [f"+queue.marker={tmp_path / 'failed'}", "+queue.after=10"]
    members = ForkedMembers(tmp_path, words, [1, 1, 1])
    (result,) = play(members, (1, 2), lambda: None)
    assert result["tokens"] == expected() and result["report"]["membership"]["lost"] == 1
    log = log_of(tmp_path, 0)
    assert "failed: RuntimeError: this queue fails once" in log and "is there again" in log


@pytest.mark.parametrize(("victim", "transport"), [(2, "gloo"), (3, "mapped")], ids=["its leader", "its follower"])
def test_an_instance_of_several_ranks_rejoins_as_a_whole(victim, transport, tmp_path):
    words = [
        *test_tensor_parallel.DISTRIBUTED, *LASTING, "cluster=1p1d", "mode=pd_caching_3", f"transport={transport}",
        "granularity=by_layer", "cluster.patience_s=60", *test_tensor_parallel.sizes(decode=2),
    ]  # fmt: skip
    members = ForkedMembers(tmp_path, words, [1, 1, 2])
    (result,) = play(members, (1, 2), lambda: members.signal(victim, signal.SIGKILL))
    assert result["tokens"] == test_tensor_parallel.expected(LASTING)
    counts = {key: result["report"]["membership"][key] for key in ("joined", "left", "lost")}
    assert counts == {"joined": 1, "left": 0, "lost": 1} and result["report"]["num_failed"] == 0


def started(directory, name, words, launcher):
    """A member, or what starts it again and again, from the command line; what it prints goes to a file."""
    command = [sys.executable, *launcher, str(TESTS.parent / "scripts" / "run.py"), *words, f"cluster.member={name}"]
    with (directory / f"printed-{name}").open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=own_environment(OMP_NUM_THREADS="1"))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc, to find what torchrun has started")
def test_run_py_is_started_again_by_its_own_torchrun_and_rejoins(tmp_path):
    out = tmp_path / "out"
    words = [*PATIENT, *PD, "transport=gloo", f"cluster.store=127.0.0.1:{free_port()}", f"hydra.run.dir={out}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "1"]
    processes = [started(tmp_path, "scheduler", words, [])]
    processes += [started(tmp_path, name, words, [*torchrun, "--max-restarts", "2"]) for name in (0, 1)]

    def printed():
        return "\n".join(path.read_text() for path in [*tmp_path.glob("printed-*"), *out.glob("*.log")])

    try:
        logs = [out / "rank-1.log", out / "rank-2.log"]
        wait_until(lambda: all(log.exists() and "starts" in log.read_text() for log in logs), START_S, printed)
        (victim,) = children(processes[2].pid)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: all(process.poll() is not None for process in processes), LIMIT_S, printed)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0, 0], printed()
    assert "cluster.member=0, 1" in (tmp_path / "printed-scheduler").read_text()
    records = map(json.loads, (out / "requests.jsonl").read_text().splitlines())
    assert {record["request_id"]: record["output_token_ids"] for record in records} == expected()
    assert "rank 2 is there again" in (out / "rank-0.log").read_text()
    assert {"decode-1", "decode-2"} <= {
        line.split()[-2] for line in logs[1].read_text().splitlines() if "starts" in line
    }
