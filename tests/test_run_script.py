"""scripts/run.py as a user calls it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file

from memserve import LocalCluster, load_config
from memserve.metrics.repeats import of_what
from memserve.model.model_path import open_model

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["exec=simulated", "workload.num_sessions=4", "workload.max_turns=2", "workload.max_output_tokens=8"]
LONG = ["exec=simulated", "workload=synthetic", "workload.num_sessions=5000", "workload.num_turns=3"]
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
        "prompt", "cached_local", "fetched", "computed", "computed_again", "computed_on_decode",
        "generated", "computed_in_vain", "generated_in_vain",
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and all(len(line["output_token_ids"]) <= 8 for line in lines)
    assert "num_hbm_blocks: 2048" in (tmp_path / "config.yaml").read_text()
    assert json.loads((tmp_path / "env.json").read_text())["seeds"] == {"seed": 0}
    assert "TTFT" in done.stdout and sorted(p.name for p in tmp_path.iterdir()) == [
        "activity.jsonl", "config.yaml", "env.json", "occupancy.jsonl", "report.json", "requests.jsonl",
    ]  # fmt: skip


def test_a_bad_word_ends_with_one_line_and_leaves_no_report(tmp_path):
    done = run(*SMALL, "workload.path=/nowhere.jsonl", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "/nowhere.jsonl" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "report.json").exists()


def test_results_that_cannot_be_written_end_with_one_line_that_says_where(tmp_path):
    (tmp_path / "requests.jsonl").mkdir()
    done = run(*SMALL, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "requests.jsonl" in done.stderr.splitlines()[-1]


def test_a_model_whose_logits_are_no_numbers_ends_a_run_with_one_line_that_names_the_request(tmp_path):
    shape = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 16,
             "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    weights = open_model(f"random:{tmp_path}").weights
    tensors = {name: weights.tensor(name) for name in weights.names()}
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, tmp_path / "model.safetensors")
    words = ["step_time=model", "workload=synthetic", "workload.num_sessions=1", "workload.prompt_tokens=9"]
    done = run(*words, f"model.path={tmp_path}", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: row 0 of 1 (request synthetic-00000/0, position 9): the largest logit is nan"), last
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_a_run_and_a_sweep_that_are_interrupted_say_so_in_one_line(sweep, tmp_path):
    """Once they play: what they have written says so."""
    words = [*sweep, *LONG, f"hydra.{'sweep' if sweep else 'run'}.dir={tmp_path}"]
    script = str(ROOT / "scripts" / "run.py")
    with subprocess.Popen(
        [sys.executable, "-u", script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        if sweep:
            while not any(log.stat().st_size for log in tmp_path.glob("*/printed.log")):
                time.sleep(0.1)
        else:
            process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGINT
    assert said.splitlines()[-1] == "error: interrupted by SIGINT" and "Traceback" not in said


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_sweep_alone_ends_the_point_that_runs_too(signum, tmp_path):
    command = [sys.executable, "-u", str(ROOT / "scripts" / "run.py"), "-m", *LONG, f"hydra.sweep.dir={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not any(log.stat().st_size for log in tmp_path.glob("*/printed.log")):
            time.sleep(0.1)
        (point,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signum)
        said = process.communicate()[1]
    assert process.returncode == 128 + signum and said.splitlines()[-1] == f"error: interrupted by {signum.name}"
    assert not Path(f"/proc/{point}").exists()


def test_a_sweep_runs_every_point_in_its_own_process_tabulates_them_and_goes_on(tmp_path):
    """Of its words no file system takes the lists; the last of them is refused."""
    roles = ("[prefill,decode]", "[prefill,decode,decode]", "[]")
    words = ["exec=simulated", "mode=pd_basic", "workload.num_sessions=2", "workload.max_turns=1"]
    command = ["-m", *words, f"cluster.roles={','.join(roles)}", f"hydra.sweep.dir={tmp_path}"]
    done = run(*command)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    points = [path for path in tmp_path.iterdir() if path.is_dir()]
    finished = sorted(point for point in points if (point / "report.json").is_file())
    assert len(points) == 3 and len(finished) == 2
    (refused,) = set(points) - set(finished)
    assert "cluster.roles=[]: expected at least one role" in (refused / "printed.log").read_text()
    progress, _, table = done.stdout.rpartition("TTFT mean")
    for name in roles[:2]:
        assert f"cluster.roles={name},exec=simulated,{','.join(sorted(words[1:]))}: done" in progress
    assert len([line for line in table.splitlines() if line.startswith(" cluster.")]) == 2
    assert "cluster.roles=[],exec=simulated" in table and ": no report" in table
    assert len(json.loads((finished[0] / "report.json").read_text())["instances"]) in (2, 3)
    (finished[0] / "report.json").unlink()
    again = run(*command).stdout
    assert again.count(": done before") == 1 and again.count(": done\n") == 1
    assert (finished[0] / "report.json").exists()


def test_a_directory_of_ones_own_words_is_read_by_a_sweeps_points_and_all_their_ranks(tmp_path):
    own = tmp_path / "own" / "workload"
    own.mkdir(parents=True)
    few = "num_sessions: 2\nprompt_tokens: 40\noutput_tokens: 4\nrate: 50\n"
    (own / "few.yaml").write_text(f"# @package workload\ndefaults: [synthetic, _self_]\n{few}")
    words = ["-m", "--config-dir=own", "exec=distributed", "tokens=hash", "transport=gloo", "workload=few"]
    done = run(*words, f"hydra.sweep.dir={tmp_path}")
    (log,) = tmp_path.glob("*/printed.log")
    assert done.returncode == 0, log.read_text()
    assert json.loads((log.parent / "report.json").read_text())["num_finished"] == 2


def test_repeats_report_the_median_and_its_spread(tmp_path):
    measured = ["exec=emulated", "model=tiny", "step_time=measured", *SMALL[1:]]
    LocalCluster(load_config([*measured, "repeats=3"])).run(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    spread = report["spread"]["ttft_s"]["mean"]
    assert report["repeats"] == 3 and spread["min"] <= report["ttft_s"]["mean"] <= spread["max"]


def test_seeds_report_the_mean_of_runs_each_of_which_has_a_workload_of_its_own(tmp_path):
    words = [*SMALL, "cluster=colocated_2", "policy=random"]
    LocalCluster(load_config([*words, "seed=4", "seeds=3"])).run(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    alone = [LocalCluster(load_config([*words, f"seed={seed}"])).run() for seed in (4, 5, 6)]
    ttft = [run["ttft_s"]["mean"] for run in alone]
    assert report["seeds"] == [4, 5, 6] and "repeats" not in report and len(set(ttft)) == 3
    assert report["ttft_s"]["mean"] == pytest.approx(sum(ttft) / 3)
    assert report["spread"]["ttft_s"]["mean"] == {"min": min(ttft), "max": max(ttft)}
    assert of_what(report) == "mean of seeds 4, 5, 6"
