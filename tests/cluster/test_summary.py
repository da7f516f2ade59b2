"""The report's account of what went between instances agrees with what requests say of it."""

import io

import numpy as np
import pytest
from rich.console import Console

from memserve import LocalCluster, load_config
from memserve.cluster.summary import report_of, summarize
from memserve.config.schema import MeasureConfig, SloConfig
from memserve.metrics.table import print_report
from memserve.transfer import MessageFaults
from memserve.workload import ChatWorkload

SHARING = ["exec=simulated", "workload=synthetic", "workload.num_sessions=12", "workload.num_turns=3",
           "workload.rate=20", "workload.prefix_tokens=512", "workload.share_ratio=6"]  # fmt: skip


def test_fetches_between_colocated_instances_are_transfers_between_them():
    fetching = ["cluster=colocated_4", "index_source=exact", "fetch=always", "policy=round_robin"]
    report = LocalCluster(load_config([*SHARING, *fetching])).run()
    ways, num_fetched = report["transfers"], report["tokens"]["fetched"]
    assert ways["between"]["tokens"] == num_fetched > 0 == ways["p_to_d"]["tokens"] == ways["d_to_p"]["tokens"]
    assert ways["between"]["seconds"] > 0 and ways["between"]["transfers"] >= report["fetches"]["fetched"] > 0
    out = io.StringIO()
    print_report(report, console=Console(file=out, width=100))
    assert any("between" in line and f"{num_fetched:,} tokens" in line for line in out.getvalue().splitlines())


def test_what_prefill_instances_fetch_from_each_other_is_no_hand_off():
    words = ["cluster=3p1d", "mode=pd_caching_1", "index_source=exact", "policy=round_robin", "transfer.retry_s=10"]
    reports = [LocalCluster(load_config([*SHARING, *words, f"fetch={fetch}"])).run() for fetch in ("never", "always")]
    ways, num_fetched = [report["transfers"] for report in reports], reports[1]["tokens"]["fetched"]
    assert [way["between"]["tokens"] for way in ways] == [0, num_fetched] and num_fetched > 0
    assert ways[0]["p_to_d"]["tokens"] == ways[1]["p_to_d"]["tokens"] > 0


@pytest.mark.parametrize("granularity", ["by_layer", "by_request"])
@pytest.mark.parametrize("on_failure", ["recompute", "fail"])
def test_every_token_that_was_computed_is_in_the_report(granularity, on_failure):
    """Of attempts that came to nothing too: their hand-offs fail, and no request has their counts."""
    words = ["cluster=2p1d", "mode=pd_basic", "transfer.retry_s=0.05", "transfer.deadline_s=0.5",
             f"granularity={granularity}", f"transfer.on_failure={on_failure}"]  # fmt: skip
    cluster = LocalCluster(load_config([*SHARING, *words])).cluster()
    cluster.faults = MessageFaults(np.random.default_rng(1), drop=0.9, kinds=["Done", "Inserted"], limit=200)
    while cluster.advance():
        pass
    summaries = [summarize(n.instance, n.busy_ns, n.occupancy, n.activity, cluster.now_ns) for n in cluster.nodes]
    counted = (cluster.client.counts, 1.0, SloConfig(), MeasureConfig(), ChatWorkload())
    report = report_of(cluster.scheduler, cluster.members, summaries, *counted)
    assert (report["num_failed"] > 0) == (on_failure == "fail")
    tokens, counted = report["tokens"], [n.instance.scheduler.counts for n in cluster.nodes]
    assert tokens["computed_in_vain"] > 0 < tokens["generated_in_vain"]
    computed = tokens["computed"] + tokens["computed_on_decode"] + tokens["computed_in_vain"]
    assert computed == sum(counts.computed for counts in counted)
    assert tokens["generated"] + tokens["generated_in_vain"] == sum(counts.generated for counts in counted)
    assert all(
        row["tokens"]["computed_in_vain"] >= 0 <= row["tokens"]["generated_in_vain"] for row in report["instances"]
    )
    out = io.StringIO()
    print_report(report, console=Console(file=out, width=100))
    line = next(line for line in out.getvalue().splitlines() if "tokens in vain" in line)
    assert f"{tokens['computed_in_vain']:,} computed, {tokens['generated_in_vain']:,} generated" in line


def test_a_step_that_goes_on_after_the_last_request_has_failed_is_in_use_until_then_alone():
    words = ["exec=simulated", "workload=synthetic", "workload.num_sessions=1", "workload.prompt_tokens=4000"]
    local = LocalCluster(load_config([*words, "cluster=1p1d", "mode=pd_basic", "transfer.on_failure=fail"]))
    cluster = local.cluster()
    lost_ns = cluster.client.next_time_ns() + 10_000_000
    cluster.call_at(lost_ns, lambda: cluster.crash("decode-1"))
    result = local.play(cluster)
    (row,), (step,) = result.report["instances"], result.activity
    assert result.report["failures"] == {"instance_lost": 1} and step.end_s > step.start_s + 0.05
    assert (row["busy_s"], row["utilisation"], result.report["makespan_s"]) == (0.01, 1.0, 0.01)
