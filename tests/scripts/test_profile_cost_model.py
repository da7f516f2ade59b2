"""The profile measures every kind of step, and what it writes is a cost model that a run on this machine takes."""

import itertools
import sys
from functools import partial

import numpy as np
import pytest
from cluster.test_distributed import TESTS, torchrun

from memserve import LocalCluster, load_config
from memserve.config.errors import ConfigError
from memserve.sched.cost_model.fitted import load_cost_file

SMALLEST = ["--max-context", "64", "--max-tokens", "64", "--max-batch", "2", "--repeats", "1", "--held-out", "4",
            "--repeat-s", "0"]  # fmt: skip
SMALL = ["--max-context", "128", "--max-tokens", "64", "--max-batch", "3", "--repeats", "2", "--held-out", "8",
         "--repeat-s", "0"]  # fmt: skip


def test_one_command_measures_fits_and_saves_what_a_run_then_takes(script, tmp_path, capsys, monkeypatch):
    path = tmp_path / "costs.json"
    monkeypatch.setattr(sys, "argv", ["profile_cost_model.py", "--out", str(path), "model=tiny", *SMALL])
    script("profile_cost_model").main()
    shown = capsys.readouterr().out
    assert "several" in shown and "operator" in shown
    file = load_cost_file(path)
    assert file.subject.shape["num_layers"] == 3 and file.subject.dtype == "float32"
    assert set(file.provenance.held_out_percent) == {"operator", "arch"} and len(file.held_out) == 8
    assert file.operator["swap_block_s"] > 0
    words = ["model=tiny", "step_time=model", "cost_model=fitted", f"cost_model.path={path}", "workload=synthetic"]
    small = ["workload.num_sessions=1", "workload.prompt_tokens=40", "workload.max_output_tokens=3"]
    report = LocalCluster(load_config([*words, *small])).run()
    assert report["ttft_s"]["mean"] > 0


def test_under_torchrun_it_measures_the_split_model_that_a_split_instance_then_runs(tmp_path):
    path, scripts = tmp_path / "costs.json", TESTS.parent / "scripts"
    words = ["model=tiny", "model.num_threads=1"]
    status, printed = torchrun(2, scripts / "profile_cost_model.py", "--out", path, *words, *SMALLEST)
    assert status == 0, printed
    subject = load_cost_file(path).subject
    assert subject.tensor_parallel == 2 and subject.shape["num_heads"] == 3 and subject.threads == 1
    words += ["cluster=colocated_1", "policy=cost_based", "cost_model=fitted", f"cost_model.path={path}"]
    words += ["workload=synthetic", "workload.num_sessions=1", "workload.prompt_tokens=40"]
    split = ["exec=distributed", "cluster.tensor_parallel.colocated=2", f"hydra.run.dir={tmp_path}/out"]
    status, printed = torchrun(3, scripts / "run.py", *words, "workload.max_output_tokens=3", *split)
    assert status == 0, printed
    with pytest.raises(ConfigError, match="expected .*num_heads"):  # a whole instance is another model
        LocalCluster(load_config(words))


def test_the_steps_fitted_and_held_out_stay_within_the_limits_and_are_of_every_kind(script):
    grid = script("step_grid")
    points = grid.linear_points(512, 2048)
    assert points[0] == 1 and points[-1] == 512
    held_out = grid.held_out_cases(40, points[-1], 512, 8, np.random.default_rng(0))
    for case in [*grid.fitted_cases(points, 512, 8, np.random.default_rng(0)), *held_out]:
        total = np.add(case.num_cached, case.num_new)
        assert len(case.num_cached) <= 9 and total.max() <= 512 and min(case.num_new) >= 1 and min(case.num_cached) >= 0
    kinds = {(len(c.num_new) > 1, min(c.num_new) == 1, max(c.num_new) > 1) for c in held_out}
    assert {(False, False, True), (True, True, False), (True, False, True), (True, True, True)} <= kinds


def test_every_prompt_of_a_batch_computes_a_token_however_large_the_batch(script):
    grid = script("step_grid")
    cases = grid.fitted_cases(grid.linear_points(64, 64), 64, 64, np.random.default_rng(0))
    assert min(min(case.num_new) for case in cases) == 1


def test_a_run_without_a_model_has_no_steps_to_measure(script, tmp_path, monkeypatch):
    path = tmp_path / "costs.json"
    monkeypatch.setattr(sys, "argv", ["profile_cost_model.py", "--out", str(path), "exec=simulated"])
    with pytest.raises(SystemExit, match="error: tokens=hash: expected a model"):
        script("profile_cost_model").main()
    assert not path.exists()


def test_a_call_that_slows_the_pace_behind_it_counts_as_what_it_takes(script):
    """It leaves the caches full of its own: the pace is twice as slow right after it, and as ever a run later."""
    pacing, ran = script("pacing"), []

    def run(name, seconds):
        follows_large = ran[-1:] == ["large"]
        ran.append(name)
        return seconds * (1 + (follows_large and name == "pace"))

    calls = [partial(run, "large", 0.02), partial(run, "small", 0.002)]
    times = pacing.paced_times(calls, partial(run, "pace", 0.001), 3, 0.04, np.random.default_rng(0))
    assert times.tolist() == [pytest.approx([0.02] * 3), pytest.approx([0.002] * 3)]


def test_a_short_call_counts_by_the_pace_beside_it_and_a_long_one_by_itself(script):
    """A machine that is half as fast in every other repeat: the figures agree all the same, at the mean pace."""
    pacing, calls = script("pacing"), itertools.count()

    def run(seconds):
        number = next(calls)
        repeat = max(number - 2, 0) // 5  # two first runs; then the pace three times and the call twice
        return seconds * (1 + repeat % 2)

    rng = np.random.default_rng(0)
    short = pacing.paced_times([partial(run, 0.01)], partial(run, 0.004), 4, 0.02, rng)
    assert short.tolist() == [pytest.approx([0.015] * 4)]
    long = pacing.paced_times([lambda: 0.3], partial(run, 0.004), 3, 0.02, rng)
    assert long.tolist() == [[0.3] * 3]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--out", "x", "--repeats", "0"], "--repeats=0: expected an integer >= 1"),
        (["--out", "x", "--repeat-s", "-1"], "--repeat-s=-1.0: expected seconds >= 0"),
        (["--out", "/nowhere/x"], "--out: /nowhere/x: expected a file in a directory that is there"),
    ],
)
def test_options_out_of_range_are_refused_by_name_before_anything_is_measured(
    script, monkeypatch, capsys, words, named
):
    monkeypatch.setattr(sys, "argv", ["profile_cost_model.py", *words])
    with pytest.raises(SystemExit):
        script("profile_cost_model").main()
    assert named in capsys.readouterr().err
