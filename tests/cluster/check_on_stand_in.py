"""Clusters on the stand-in, emulated and as processes; run by test_on_stand_in.py under Triton's interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from child_process import own_environment

from memserve import LocalCluster, load_config

TESTS = Path(__file__).parents[1]
SMALL = [
    "model=tiny", "model.random.num_hidden_layers=1", "model.random.num_attention_heads=4",
    "model.random.num_key_value_heads=1", "workload=synthetic", "workload.num_sessions=2", "workload.num_turns=2",
    "workload.prompt_tokens=12", "workload.turn_tokens=4", "workload.max_output_tokens=4", "workload.rate=200",
    "workload.think_time_s=0.05", "kvcache.block_size=4", "kvcache.num_hbm_blocks=40",
]  # fmt: skip
ON_GPU, PD = ["model.device=cuda"], ["cluster=1p1d", "mode=pd_caching_3"]
SWAPPING = [
    "kvcache.num_hbm_blocks=9",
    "kvcache.num_dram_blocks=20",
    "preemption=swap",
    "sched.decode_headroom_blocks=1",
]
BY_LAYER = [
    "granularity=by_layer", "sched.chunk_size=5", "model.random.num_hidden_layers=2", "workload.num_sessions=1",
]  # fmt: skip
CAPTURED = ["granularity=packed", "model.compile=true", *SWAPPING]
BESIDE_COMPUTE = ["granularity=by_request_agg", "layout=aggregated", *SWAPPING, "kvcache.async_swap=true"]


def emulated(words):
    cluster = LocalCluster(load_config([*SMALL, *words]))
    return {t.request_id: t.token_ids.tolist() for t in cluster.run_once().timelines}


def expected(way):
    """Of one instance on the CPU that caches nothing."""
    asked = [word for word in way if word.startswith(("model.random", "workload"))]
    return emulated([*asked, "model.device=cpu", "model.attention=reference", "index=none", "step_time=model"])


def test_an_emulated_cluster_answers_as_a_cpu():
    assert emulated([*ON_GPU, *PD, *BY_LAYER]) == expected(BY_LAYER)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("transport", "way"), [("mapped", BESIDE_COMPUTE), ("gloo", CAPTURED)])
def test_processes_answer_as_a_cpu(transport, way, tmp_path):
    words = ["exec=distributed", f"transport={transport}", *SMALL, *ON_GPU, *PD, *way, f"hydra.run.dir={tmp_path}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command += [str(TESTS.parent / "scripts" / "run.py"), *words]
    own = own_environment(TESTS / "stand_in" / "site", TESTS, OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=own, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = map(json.loads, (tmp_path / "requests.jsonl").read_text().splitlines())
    assert {record["request_id"]: record["output_token_ids"] for record in records} == expected(way)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["num_failed"] == 0 and report["quarantined_blocks"] == 0
    assert json.loads((tmp_path / "env.json").read_text())["gpus"] == ["stand-in"]
