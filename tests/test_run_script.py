"""scripts/run.py as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

from memserve import LocalCluster, load_config

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["exec=simulated", "workload.num_sessions=4", "workload.max_turns=2", "workload.max_output_tokens=8"]
KEYS = {
    "num_requests", "num_finished", "num_failed", "ttft_s", "tpot_s", "itl_s", "jct_s", "tokens", "transfers",
    "instances", "quarantined_blocks", "near_ties", "wall_s",
}  # fmt: skip


def run(*words):
    command = [sys.executable, str(ROOT / "scripts" / "run.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=words[-1].partition("=")[2], check=False)


def test_a_run_leaves_its_config_report_requests_and_environment(tmp_path):
    done = run(*SMALL, "cluster=colocated_2", "policy=least_load", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) >= KEYS and report["num_finished"] == 8
    assert [row["id"] for row in report["instances"]] == ["colocated-0", "colocated-1"]
    assert set(report["tokens"]) == {
        "prompt", "cached_local", "fetched", "computed", "computed_on_decode", "generated",
        "computed_in_vain", "generated_in_vain",
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and all(len(line["output_token_ids"]) <= 8 for line in lines)
    assert "num_hbm_blocks: 2048" in (tmp_path / "config.yaml").read_text()
    assert json.loads((tmp_path / "env.json").read_text())["seeds"] == {"seed": 0}
    assert "TTFT" in done.stdout and sorted(p.name for p in tmp_path.iterdir()) == [
        "activity.jsonl", "config.yaml", "env.json", "occupancy.jsonl", "report.json", "requests.jsonl",
    ]  # fmt: skip


def test_a_bad_word_ends_with_one_line_and_leaves_no_report(tmp_path):
    for word in ("tokens=model", "workload.path=/nowhere.jsonl"):  # refused when it is composed, and when it is built
        done = run(*SMALL, word, f"hydra.run.dir={tmp_path}")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert word.partition("=")[2] in done.stderr.splitlines()[-1]
        assert not (tmp_path / "report.json").exists()


def test_a_sweep_runs_every_point_in_its_own_process_tabulates_them_and_goes_on(tmp_path):
    words = ["-m", *SMALL, "index=none,radix", f"hydra.sweep.dir={tmp_path}"]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    reports = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("report.json")}
    assert len(reports) == 2
    for name, report in reports.items():
        assert (report["tokens"]["cached_local"] == 0) == ("index=none" in name)
        assert f"{name}: done" in done.stdout
    table = done.stdout.rpartition(": done\n")[2]
    assert all(word in table for word in ("index=none", "index=radix", "hit ratio"))
    unfinished = min(path for path in tmp_path.iterdir() if path.is_dir())
    (unfinished / "report.json").unlink()
    again = run(*words).stdout
    assert again.count(": done before") == 1 and f"{unfinished.name}: done\n" in again
    assert (unfinished / "report.json").exists()


def test_a_sweep_names_points_whose_words_no_file_system_takes_and_fails_where_one_of_them_does(tmp_path):
    roles = "cluster.roles=[prefill,decode],[prefill,decode,decode],[]"
    words = ["workload=synthetic", "workload/arrivals=gamma", "workload.num_sessions=2", "mode=pd_basic"]
    done = run("-m", "exec=simulated", *words, roles, f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    points = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(points) == 3 and sum((point / "report.json").is_file() for point in points) == 2
    (refused,) = (point for point in points if not (point / "report.json").exists())
    assert "cluster.roles=[]: expected at least one role" in (refused / "printed.log").read_text()
    progress, _, table = done.stdout.rpartition("TTFT mean")
    for name in ("cluster.roles=[prefill,decode]", "cluster.roles=[prefill,decode,decode]"):
        assert f"{name},exec=simulated" in progress
    assert len([line for line in table.splitlines() if line.startswith(" cluster.")]) == 2
    assert f"cluster.roles=[],exec=simulated,{','.join(sorted(words))}: no report" in table


def test_repeats_report_the_median_and_its_spread(tmp_path):
    LocalCluster(load_config([*SMALL, "repeats=3"])).run(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["repeats"] == 3 and report["spread"]["ttft_s"]["mean"]["min"] == report["ttft_s"]["mean"]
