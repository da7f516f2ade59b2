"""Ranks of instances of several, killed and stopped: the instance is routed around as a whole, and the others go on."""

import json
import signal
import time
from pathlib import Path

import pytest
from cluster.forked_ranks import Forked
from cluster.survival import LIMIT_S, START_S, check, have_started, wait_for
from cluster.test_distributed import WORKLOAD
from cluster.test_tensor_parallel import DISTRIBUTED, expected, sizes

from memserve.cluster.distributed import check_ended
from memserve.cluster.result import Result
from memserve.cluster.turnover import InstanceFailed

LASTING = [*WORKLOAD, "workload.num_sessions=60", "workload.rate=5"]
NUM_RANKS = 8  # 1 and 2 are prefill-0, 3 and 4 prefill-1, 5 and 6 prefill-2, 7 is decode-3; the first of each leads
KILLED, STOPPED, STOPPED_AWHILE = 1, 4, 6

pytestmark = pytest.mark.timeout(300)  # real processes, beside whatever else the machine does


def memory_of(pids):
    return [path for path in Path("/dev/shm").iterdir() if any(str(pid) in path.name for pid in pids)]


def test_killed_leaders_and_stopped_followers_under_mapped_cost_their_own_instance_alone(tmp_path):
    words = [
        *DISTRIBUTED, *LASTING, "cluster.roles=[prefill,prefill,prefill,decode]", "mode=pd_caching_3",
        "transport=mapped", "granularity=by_layer", "policy=random", "cluster.silence_s=2", "transfer.deadline_s=2",
        *sizes(prefill=2),
    ]  # fmt: skip
    ranks = Forked(tmp_path, [[words, NUM_RANKS]], NUM_RANKS)
    log = tmp_path / "found.json.rank-0.log"
    try:
        wait_for(lambda: have_started(tmp_path, (1, 3, 5, 7)), START_S, "the cluster starts", ranks)
        ranks.signal(STOPPED_AWHILE, signal.SIGSTOP)
        wait_for(lambda: "prefill-2 is silent" in log.read_text(), 30, "who is stopped is missed", ranks)
        ranks.signal(STOPPED_AWHILE, signal.SIGCONT)
        wait_for(lambda: "prefill-2 is back" in log.read_text(), 30, "who goes on is heard", ranks)
        ranks.signal(KILLED, signal.SIGKILL)
        ranks.signal(STOPPED, signal.SIGSTOP)
        time.sleep(0.1)
        assert ranks.codes()[0] is None, "all was over before"
        others = [0, 2, 5, 6, 7]
        wait_for(lambda: None not in [ranks.codes()[rank] for rank in others], LIMIT_S, "the others end", ranks)
        assert [ranks.codes()[rank] for rank in others] == [0, 1, 0, 0, 0], ranks.printed()
        ranks.signal(STOPPED, signal.SIGKILL)  # as torchrun does once rank 0 has said so
        wait_for(ranks.ended, 30, "its leader ends", ranks)
        assert not memory_of(ranks.pids())
    finally:
        ranks.kill()
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["missing"] == {"prefill-0": "gone", "prefill-1": "silent"}
    ends = check(found, expected(LASTING))
    assert ends.get("length", 0) + ends.get("stop", 0) > len(found["ends"]) / 2


def test_an_instance_that_may_still_be_there_ends_the_last_run_by_name_after_its_results():
    def result(missing):
        return Result({}, [], [], [], missing=missing)

    check_ended([], None)
    check_ended([result({}), result({"decode-1": "gone"})], "out")
    with pytest.raises(InstanceFailed, match="decode-1 is silent at the end of the run, whose results are in out"):
        check_ended([result({"prefill-0": "gone", "decode-1": "silent"})], "out")
