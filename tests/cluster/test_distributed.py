"""Instances as processes: the answers of the emulated cluster, under each transport; and what is refused by name."""

import functools
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from child_process import own_environment
from cluster.survival import found_by

from memserve import LocalCluster, load_config
from memserve.cluster.launch import check_world, find_place
from memserve.config.errors import ConfigError
from memserve.metrics.activity import load_activity

TESTS = Path(__file__).resolve().parents[1]
WORKLOAD = [
    "workload=synthetic", "workload.num_sessions=4", "workload.num_turns=2", "workload.prompt_tokens=50",
    "workload.turn_tokens=15", "workload.prefix_tokens=24", "workload.share_ratio=2", "workload.max_output_tokens=8",
    "workload.rate=200", "workload.think_time_s=0.05",
]  # fmt: skip
STORE = ["store=write_through", "fetch=always", "+per_role.store.kvcache.num_dram_blocks=20"]
MODES = ("pd_basic", "pd_caching_1", "pd_caching_2", "pd_caching_3")
LIMIT_S = 280

pytestmark = pytest.mark.timeout(300)  # real processes, beside whatever else the machine does


def torchrun(world_size, *arguments):
    """(exit status, everything printed) of a script under torchrun on this host."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(world_size)]  # and by no name, which a machine without a network may not know
    own = own_environment(OMP_NUM_THREADS="1")
    command += map(str, arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=own, check=False)
    return done.returncode, done.stdout + done.stderr


def cases(transport):
    """(kind of tokens, words, ranks)"""
    for mode in MODES:
        yield "hash", ["cluster=1p1d", f"mode={mode}", "granularity=by_layer", "sched.chunk_size=16"], 3
        words = ["cluster=1p2d", f"mode={mode}", "granularity=by_request_agg", "layout=aggregated"]
        yield "hash", [*words, "kvcache.num_hbm_blocks=16", "sched.decode_headroom_blocks=1"], 4
    yield "hash", ["cluster=colocated_2"], 3
    yield "hash", ["cluster=1p1d", "mode=pd_caching_3", "granularity=packed", "kvcache.block_size=4"], 3
    yield "hash", ["cluster=2p1d", "mode=pd_caching_3", "granularity=by_request", "kvcache.num_dram_blocks=30",
                   "kvcache.num_hbm_blocks=16", "preemption=swap", "sched.decode_headroom_blocks=1",
                   "kvcache.async_swap=true", "kvcache.swap_ahead_blocks=3", "batching=prefill_first"], 4  # fmt: skip
    yield "model", ["cluster=1p1d", "mode=pd_caching_3", "granularity=by_layer", "model=tiny"], 3
    yield "model", ["cluster=1p2d", "mode=pd_caching_2", "granularity=by_request", "model=tiny"], 4
    yield "hash", ["cluster.roles=[colocated,store,colocated]", "policy=round_robin", "index_source=exact", *STORE], 4
    yield "model", ["cluster.roles=[store,prefill,decode]", "mode=pd_caching_3", "model=tiny", *STORE], 4
    for policy, roles in (
        ("write_through_selective", "colocated,store,colocated"),
        ("write_back", "store,colocated,store"),
    ):
        words = [f"cluster.roles=[{roles}]", "policy=round_robin", "kvcache.num_hbm_blocks=12"]
        yield "hash", [*words, f"store={policy}", *STORE[1:]], 4
    if transport == "gloo":
        yield "hash", ["cluster=1p1d", "mode=pd_caching_2", "granularity=by_request", "channels=3"], 3
        yield "hash", ["cluster=1p1d", "mode=pd_caching_3", "granularity=by_layer",
                       "transport._target_=cluster.own_transport.Narrow", "+transport.gb_per_s=0.01"], 3  # fmt: skip


@functools.cache
def expected(tokens, number=0):
    """number: of the run, of several seeds."""
    alone = ["exec=simulated"] if tokens == "hash" else ["exec=emulated", "step_time=model", "model=tiny"]
    cluster = LocalCluster(load_config([*alone, *WORKLOAD, "cluster=colocated_1", "index=none", "seeds=2"]))
    return {t.request_id: t.token_ids.tolist() for t in cluster.run_once(number=number).timelines}


@pytest.mark.parametrize("transport", ["mapped", "gloo"])
def test_answers_are_the_emulated_cluster_s_in_every_mode(transport, tmp_path):
    chosen = list(cases(transport))
    distributed = ["exec=distributed", f"transport={transport}", "model.num_threads=1", *WORKLOAD]
    listed = [[[*distributed, f"tokens={tokens}", *words], ranks] for tokens, words, ranks in chosen]
    found = found_by(tmp_path, listed, 4, LIMIT_S)
    for (tokens, words, _), result in zip(chosen, found, strict=True):
        assert result["tokens"] == expected(tokens), words
        report = result["report"]
        assert report["num_failed"] == 0 and report["quarantined_blocks"] == 0
        sent = report["transfers"]["p_to_d"]
        assert (sent["tokens"] > 0) == ("colocated" not in words[0]) and sent["failed"] == 0, words
        assert (report["store"] is not None) == (STORE[1] in words), words
        if report["store"] is not None:
            received = report["store"]["received"]
            assert received["tokens"] > 0 == received["failed"] and report["store"]["num_indexed_blocks"] > 0


def assert_on_one_clock(records, spans):
    """What one process times, another reads: moves by the sender's clock, all else by the receiver's."""
    moved = [r for r in records if r["arrived_s"] is not None]
    last_s, apart_s = max(r["finished_s"] for r in records), 0.01
    assert moved and any(span.to for span in spans)
    for r in moved:
        assert r["prefill_end_s"] - apart_s <= r["granted_s"] <= r["received_s"] <= r["decode_scheduled_s"]
        assert r["granted_s"] - apart_s <= r["arrived_s"] <= r["received_s"]
    assert all(0 <= span.start_s <= span.end_s <= last_s + 60 for span in spans)


def test_run_py_under_torchrun_leaves_one_output_directory_with_a_log_of_each_rank(tmp_path):
    """Each rank finds a word in a directory of one's own."""
    out, own = tmp_path / "out", tmp_path / "policy" / "mine.yaml"
    own.parent.mkdir()
    own.write_text("_target_: memserve.sched.routing.LeastLoad\n")
    words = ["exec=distributed", "tokens=hash", "cluster=1p1d", "mode=pd_caching_3", "transport=mapped", "seeds=2"]
    words += ["slo.jct_s=1000", "measure.until_s=0.04", f"hydra.run.dir={out}", f"hydra.searchpath=[{tmp_path}]"]
    words += ["policy=mine"]
    status, printed = torchrun(3, TESTS.parent / "scripts" / "run.py", *words, *WORKLOAD)
    assert status == 0, printed
    assert sorted(p.name for p in out.iterdir()) == [
        "activity.jsonl", "config.yaml", "env.json", "occupancy.jsonl", "rank-0.log", "rank-1.log", "rank-2.log",
        "report.json", "requests.jsonl",
    ]  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["seeds"] == [0, 1] and report["num_failed"] == 0
    assert report["goodput"]["share"] == 1 and "missed: 0 by JCT <= 1,000 s" in printed
    assert set(json.loads((out / "env.json").read_text())["threads"]["instances"]) == {"prefill-0", "decode-1"}
    records = list(map(json.loads, (out / "requests.jsonl").read_text().splitlines()))
    assert_on_one_clock(records, load_activity(out))
    measured, first_s = report["measured"], min(record["arrival_s"] for record in records)
    assert measured["num_requests"] + measured["num_left_out"] == len(records)
    assert all(record["measured"] == (record["arrival_s"] - first_s < 0.04) for record in records)
    bounds = report["spread"]["num_requests"]
    assert bounds["min"] <= sum(record["measured"] for record in records) <= bounds["max"] < len(records)
    tokens = {record["request_id"]: record["output_token_ids"] for record in records}
    assert tokens == expected("hash", 1) != expected("hash")


def test_a_rank_that_fails_ends_the_run_with_its_reason(tmp_path):
    words = ["exec=distributed", "tokens=hash", "cluster=1p1d", "mode=pd_basic", "transport=mapped"]
    words += ["kvcache.num_hbm_blocks=null", "kvcache.hbm_bytes=9000GiB", f"hydra.run.dir={tmp_path}"]
    status, printed = torchrun(3, TESTS.parent / "scripts" / "run.py", *words, *WORKLOAD)
    assert status != 0 and "error: " in printed and "GiB are available" in printed
    assert not (tmp_path / "report.json").exists()


def test_a_world_that_does_not_fit_the_cluster_is_refused_by_both_numbers():
    cfg = load_config(["exec=distributed", "cluster=1p2d", "mode=pd_basic", "transport=gloo", "tokens=hash"])
    check_world(cfg, 4)
    with pytest.raises(ConfigError, match=r"3 ranks for cluster.roles=\['prefill', 'decode', 'decode'\]: expected 4"):
        check_world(cfg, 3)


def test_without_torchrun_the_command_is_named(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    cfg = load_config(["exec=distributed", "cluster=1p1d", "mode=pd_basic", "tokens=hash"])
    with pytest.raises(ConfigError, match="expected torchrun --nproc-per-node 3 scripts/run.py"):
        find_place(cfg)


def test_a_port_that_answers_nobody_or_is_in_use_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in (
            ("RANK", "0"),
            ("WORLD_SIZE", "3"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", str(port)),
        ):
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        cfg = load_config(["exec=distributed", "cluster=1p1d", "mode=pd_basic", "tokens=hash"])
        with pytest.raises(ConfigError, match=f"no store at 127.0.0.1:{port}"):
            find_place(cfg)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["exec=distributed", "transport=in_process"], "transport=in_process contradicts exec=distributed"),
        (
            ["exec=emulated", "transport=gloo"],
            "transport=gloo contradicts exec=emulated: expected transport=in_process",
        ),
        (["exec=distributed", "tokens=workload"], "tokens=workload contradicts exec=distributed"),
        (["exec=distributed", "step_time=model"], "step_time=model contradicts exec=distributed"),
        (
            ["exec=distributed", "transport=mapped", "model.device=mps"],
            "transport=mapped contradicts model.device=mps: expected cpu or cuda",
        ),
        (["exec=distributed", "channels=0"], "channels=0: expected an integer from 1 to 64"),
        (["exec=distributed", "transport=pigeon"], "Could not find 'transport/pigeon'"),
    ],
)
def test_contradictions_are_named_before_anything_runs(words, named):
    with pytest.raises(ConfigError) as raised:
        load_config(words)
    assert named in str(raised.value)
