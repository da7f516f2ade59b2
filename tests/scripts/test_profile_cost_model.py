"""The profile measures every kind of step, and what it writes is a cost model that a run on this machine takes."""

import sys

import numpy as np
import pytest

from memserve import LocalCluster, load_config
from memserve.sched.cost_model.fitted import load_cost_file

SMALL = ["--max-context", "128", "--max-tokens", "64", "--max-batch", "3", "--repeats", "2", "--held-out", "8"]


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


def test_the_steps_fitted_and_held_out_stay_within_the_limits_and_are_of_every_kind(script):
    grid = script("step_grid")
    points = grid.linear_points(512, 2048)
    assert points[0] == 1 and points[-1] == 512
    held_out = grid.held_out_cases(40, points[-1], 512, 8, np.random.default_rng(0))
    for case in [*grid.fitted_cases(points, 512, 8), *held_out]:
        total = np.add(case.num_cached, case.num_new)
        assert len(case.num_cached) <= 9 and total.max() <= 512 and min(case.num_new) >= 1 and min(case.num_cached) >= 0
    kinds = {(len(c.num_new) > 1, min(c.num_new) == 1, max(c.num_new) > 1) for c in held_out}
    assert {(False, False, True), (True, True, False), (True, False, True), (True, True, True)} <= kinds


def test_limits_that_measure_nothing_are_refused_by_name(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["profile_cost_model.py", "--out", "x", "--repeats", "0"])
    with pytest.raises(SystemExit):
        script("profile_cost_model").main()
    assert "--repeats=0: expected an integer >= 1" in capsys.readouterr().err
