"""The benchmark plays every configuration on as many instances as it says, with a load that grows with them."""

import json

import pytest

from memserve import load_config


def test_every_configuration_has_a_row_for_each_number_of_instances(script, tmp_path, capsys):
    bench = script("bench_simulations")
    out = tmp_path / "simulations.json"
    bench.main(["--instances", "2,4", "--requests", "6", "--json", str(out)])
    recorded = json.loads(out.read_text())
    assert set(recorded["results"]) == {"2", "4"} and set(recorded["results"]["4"]) == set(bench.CONFIGURATIONS)
    assert all(rate > 0 for row in recorded["results"].values() for rate in row.values())
    assert "index_source=exact" in capsys.readouterr().out


def test_the_load_grows_with_the_instances_and_half_of_them_prefill(script, tmp_path):
    bench = script("bench_simulations")
    cfg = load_config(bench.words_of("prefill, decode", 8, 100, None))
    assert list(cfg.cluster.roles) == ["prefill"] * 4 + ["decode"] * 4
    assert cfg.workload["rate"] == 8 * bench.RATE_AN_INSTANCE
    traced = load_config(bench.words_of("colocated", 8, 100, tmp_path))
    assert (traced.workload["speedup"], traced.workload["num_sessions"]) == (2, 100)


def test_configurations_take_turns_and_the_medians_of_their_repeats_count(script, monkeypatch):
    """One after the other, each would be measured at a pace of its own on a machine that others use."""
    bench, rates = script("bench_simulations"), iter([1.0, 5.0, 2.0, 9.0, 3.0, 7.0])
    played = []
    monkeypatch.setattr(bench, "requests_per_s", lambda words: played.append(words) or next(rates))
    found = bench.measure(4, 10, None, 3, "least_load")
    assert played == [bench.words_of(name, 4, 10, None) for name in found] * 3
    assert list(found.values()) == [2.0, 7.0]


@pytest.mark.parametrize("name", ["none.jsonl", "a=b, c.jsonl"])
def test_a_trace_that_is_not_there_is_an_error_in_one_line(script, tmp_path, name):
    with pytest.raises(SystemExit, match=f"^error: workload.path='{tmp_path / name}': no such file$"):
        script("bench_simulations").main(["--path", str(tmp_path / name)])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--instances", "4,0"], "--instances: 4,0: expected integers >= 2"),
        (["--instances", "4,7"], "--instances 7: expected even numbers"),
        (["--requests", "0"], "--requests: 0: expected an integer >= 1"),
        (["--repeats", "few"], "--repeats: few: expected an integer >= 1"),
    ],
)
def test_options_out_of_range_are_named(script, capsys, words, named):
    with pytest.raises(SystemExit):
        script("bench_simulations").main(words)
    assert named in capsys.readouterr().err
