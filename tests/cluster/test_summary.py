"""The report's account of what went between instances agrees with what requests say of it."""

import io

from rich.console import Console

from memserve import LocalCluster, load_config
from memserve.metrics.table import print_report

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
