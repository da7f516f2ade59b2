"""Clusters on one GPU: emulated, and a process an instance over CUDA IPC. Shown without one: the same on a CPU
(test_distributed.py, test_emulated.py), and what a GPU adds to the transport on a stand-in (tests/transfer).
"""

import functools
import json

import pytest
import torch
from cluster.test_distributed import TESTS, WORKLOAD, torchrun

from memserve import LocalCluster, load_config
from memserve.cluster.step_time import GpuStepWatch, StepWatch

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: run scripts/gpu_check.sh on one"),
]
ON_GPU = ["model=tiny", "model.device=cuda"]
PD = ["cluster=1p1d", "mode=pd_caching_3"]
WAYS = {
    "by_layer": ["granularity=by_layer", "sched.chunk_size=16"],
    "by_request": ["granularity=by_request"],
    "by_request_agg": ["granularity=by_request_agg", "layout=aggregated"],
    "packed": ["granularity=packed", "kvcache.num_hbm_blocks=24", "kvcache.num_dram_blocks=30", "preemption=swap",
               "sched.decode_headroom_blocks=1"],
}  # fmt: skip


def tokens_of(words):
    timelines = LocalCluster(load_config([*ON_GPU, *WORKLOAD, *words])).run_once().timelines
    return {t.request_id: t.token_ids.tolist() for t in timelines}


@functools.cache
def expected():
    """Of one instance on a CPU that caches nothing."""
    return tokens_of(["model.device=cpu", "cluster=colocated_1", "index=none", "step_time=model"])


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("words", [["cluster=colocated_2"], *([*PD, *way] for way in WAYS.values())])
def test_an_emulated_cluster_on_the_gpu_answers_as_a_cpu(words, compiled) -> None:
    assert tokens_of([*words, f"model.compile={compiled}"]) == expected()


@pytest.mark.parametrize("transport", ["mapped", "gloo"])
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_on_the_gpu_answer_as_one(way, transport, tmp_path) -> None:
    """Prefill and decode instance, each a process with weights and blocks of its own, twice from empty pools."""
    words = ["exec=distributed", f"transport={transport}", *ON_GPU, *WORKLOAD, *PD, *WAYS[way], "repeats=2"]
    status, printed = torchrun(3, TESTS.parent / "scripts" / "run.py", *words, f"hydra.run.dir={tmp_path}")
    assert status == 0, printed
    records = map(json.loads, (tmp_path / "requests.jsonl").read_text().splitlines())
    assert {record["request_id"]: record["output_token_ids"] for record in records} == expected()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["num_failed"] == 0 and report["quarantined_blocks"] == 0


def test_nccl_on_one_gpu_is_refused_by_name(tmp_path) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("every rank has a GPU of its own here")
    words = ["exec=distributed", "transport=nccl", *ON_GPU, *WORKLOAD, *PD, f"hydra.run.dir={tmp_path}"]
    status, printed = torchrun(3, TESTS.parent / "scripts" / "run.py", *words)
    assert status != 0 and "uses GPU" in printed and "expected a device of its own" in printed


def test_a_step_is_timed_to_the_end_of_what_the_gpu_was_given() -> None:
    x, device = torch.randn(8192, 8192, device="cuda"), torch.device("cuda")

    def step(watch: StepWatch) -> tuple[int, list[int]]:
        for _ in range(5):
            x @ x
            watch.layer_written()
        return watch.stop()

    step(GpuStepWatch(device))
    for _ in range(20):
        x @ x  # of before: no step's
    step_ns, layers_ns = step(GpuStepWatch(device))
    assert layers_ns == sorted(layers_ns) and layers_ns[-1] <= 1.05 * step_ns
    assert layers_ns[0] > 0.1 * step_ns, "a layer ends when its products do, not when they were asked for"
