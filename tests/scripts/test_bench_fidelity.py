"""A simulation by measured costs is held against the same requests played by the model, and against no others."""

import json

import msgspec
import pytest

from memserve.sched.cost_model.fitted import load_cost_file

WORDS = ["model=tiny", "model.num_threads=1", "workload.num_sessions=3", "workload.num_turns=2",
         "workload.prompt_tokens=20", "workload.turn_tokens=8", "workload.max_output_tokens=4"]  # fmt: skip


def test_each_figure_stands_beside_its_noise_and_what_the_simulation_says(script, costs, tmp_path, capsys):
    out = tmp_path / "fidelity.json"
    script("bench_fidelity").main(["--costs", costs, "--rates", "5,50", "--repeats", "2", "--json", str(out), *WORDS])
    figures = json.loads(out.read_text())["figures"]
    assert list(figures) == ["pd_cc-at-5", "pd_cc-at-50", "1p1d_cc-at-5", "1p1d_cc-at-50"]
    for found in figures.values():
        assert set(found) == set(script("bench_fidelity").FIGURES)
        assert all(f["measured"] > 0 and f["noise"] >= 0 and f["simulated"] > 0 for f in found.values())
        assert found["JCT mean"]["off"] == found["JCT mean"]["simulated"] / found["JCT mean"]["measured"] - 1
    assert "mean of all" in capsys.readouterr().out


def test_processes_are_measured_by_the_wall_clock(script, costs, capsys):
    script("bench_fidelity").main(["--costs", costs, "--systems", "1p1d_cc", "--rates", "20", "--repeats", "1",
                                   "--processes", *WORDS])  # fmt: skip
    assert "by the wall clock" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model=tiny", "model.random.intermediate_size=128"], "intermediate_size"),
        (["workload.prompt_tokens=100000"], "requests failed"),
        (["nonsense=1"], "nonsense"),
    ],
)
def test_other_models_and_what_cannot_be_played_are_refused_by_name(script, costs, words, named):
    with pytest.raises(SystemExit, match=named):
        script("bench_fidelity").main(["--costs", costs, "--rates", "5", "--repeats", "1", *WORDS, *words])


def test_costs_of_no_model_are_refused_by_name(script, costs):
    file = load_cost_file(costs)
    nameless = msgspec.structs.replace(file, subject=msgspec.structs.replace(file.subject, shape={}))
    with pytest.raises(ValueError, match="--costs: the file names no model's sizes"):
        script("bench_fidelity").words_for_simulation(nameless)


def test_other_requests_are_no_comparison(script):
    bench = script("bench_fidelity")
    bench.check_same(("pd", 1.0), {"a/0": (3, 4)}, {"a/0": (3, 4)})
    with pytest.raises(ValueError, match=r"pd at 1: a/1 has \(7, 4\) tokens .* None simulated"):
        bench.check_same(("pd", 1.0), {"a/0": (3, 4), "a/1": (7, 4)}, {"a/0": (3, 4)})


@pytest.mark.parametrize("rates", ["", "1,0", "fast"])
def test_rates_are_numbers_above_0(script, capsys, rates):
    with pytest.raises(SystemExit):
        script("bench_fidelity").main(["--costs", "c.json", "--rates", rates])
    assert "expected sessions a second above 0" in capsys.readouterr().err
