import numpy as np

from memserve import LocalCluster, load_config
from memserve.metrics.plots import draw_latencies
from memserve.metrics.records import request_record

CROWDED = [
    "exec=simulated", "workload=synthetic", "workload.num_sessions=30", "workload.rate=50",
    "workload.max_output_tokens=8", "cluster.max_unfinished=4",
]  # fmt: skip


def test_latencies_are_drawn_of_the_requests_that_the_report_takes_them_of():
    run = LocalCluster(load_config(CROWDED)).run_once()
    assert run.report["num_failed"] > 5
    panels = draw_latencies({"run": [request_record(timeline) for timeline in run.timelines]}).axes
    for panel, key in zip(panels, ("ttft_s", "tpot_s", "jct_s"), strict=True):
        drawn = panel.lines[0].get_xdata()
        assert len(drawn) == run.report["num_finished"]
        assert np.isclose(np.median(drawn), run.report[key]["p50"])
