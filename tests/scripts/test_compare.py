"""compare.py prints systems side by side, each over several runs, and refuses unknown ones before it runs."""

import json
import re
from pathlib import Path

import pytest

WORDS = ["exec=simulated", "workload=synthetic", "workload.num_sessions=2"]


@pytest.fixture
def compare(script):
    return script("compare")


def test_systems_stand_side_by_side_with_their_spread(compare, tmp_path, capsys):
    words = ["exec=simulated", "workload=synthetic", "workload.num_sessions=2", "workload.num_turns=2", "seeds=2"]
    systems = "pd,1p1d,c1,c2,1p1d_cc,wide:cluster=1p2d+mode=pd_caching_3"
    compare.main(["--systems", systems, "--out", str(tmp_path), *words])
    out = capsys.readouterr().out
    assert "tokens P -> D" in out and "1p1d_cc" in out and "wide" in out
    reports = json.loads((tmp_path / "reports.json").read_text(encoding="utf-8"))
    assert reports["pd"]["transfers"]["p_to_d"]["tokens"] == 0 < reports["c2"]["transfers"]["p_to_d"]["tokens"]
    assert reports["1p1d"]["seeds"] == [0, 1] and (tmp_path / "wide" / "report.json").is_file()


def test_the_readme_s_systems_differ_in_what_they_are_compared_for(compare):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    systems, words = re.findall(r"^python scripts/compare\.py --systems (\S+) ([^#\n]*)", readme, flags=re.MULTILINE)[0]
    reports, _ = compare.compare(systems.split(","), [*words.split(), "seeds=1"], None)
    assert reports["1p1d"]["hit_ratio"] == 0 and min(reports[name]["hit_ratio"] for name in ("pd_cc", "1p1d_cc")) > 0.5
    assert reports["1p1d"]["ttft_s"]["mean"] > 2 * reports["1p1d_cc"]["ttft_s"]["mean"]


@pytest.mark.parametrize(
    ("words", "seeds", "repeats"),
    [
        (["exec=simulated"], 3, 1),
        (["exec=emulated", "step_time=measured"], 1, 3),
        (["exec=emulated", "step_time=measured", "seeds=2"], 2, 1),
        (["exec=simulated", "seeds=1"], 1, 1),
        (["exec=simulated", "repeats=1"], 1, 1),
    ],
)
def test_by_itself_it_draws_three_workloads_where_time_is_modelled_and_repeats_one_where_it_is_measured(
    compare, words, seeds, repeats
):
    cfg = compare.config_of(words)
    assert (cfg.seeds, cfg.repeats) == (seeds, repeats)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--systems", "2p"], "2p: expected one of pd"),
        (["--systems", "a:index=none,b:index=none,a:index=radix"], "a is given 2 times"),
        (["nonsense=1"], "nonsense"),
        (["--systems", ":index=none"], "--systems :index=none: expected a name that can be a directory's"),
        (["--systems", "../a:index=none"], "expected a name that can be a directory's"),
        (["--systems", "a:"], "--systems a:: expected a name"),
    ],
)
def test_what_is_no_system_and_no_word_is_named(compare, words, named):
    with pytest.raises(SystemExit, match=named):
        compare.main(words)


def test_a_system_that_contradicts_itself_is_named_before_another_has_run(compare, capsys):
    with pytest.raises(SystemExit, match="wide: mode=colocated contradicts .*; expected colocated"):
        compare.main(["--systems", "pd,wide:cluster=1p2d", *WORDS])
    assert "pd" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["compare", "capacity", "reproduce"])
def test_a_directory_that_cannot_be_made_is_named_before_anything_runs(script, tmp_path, capsys, name):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        script(name).main(["--out", str(tmp_path / "file" / "new"), *WORDS])
    assert "file/new: expected a directory, or where one can be made" in capsys.readouterr().err


def test_a_system_s_words_may_have_commas_in_lists_and_begin_with_a_plus(compare):
    text = "pd,a:cluster.roles=[prefill,decode]+mode=pd_basic++per_role.decode.x={a: [1,2], b: 3}+++y=1,b:cluster=1p1d"
    assert compare.words_of_each(compare.names_of(text)) == {
        "pd": compare.SYSTEMS["pd"],
        "a": ["cluster.roles=[prefill,decode]", "mode=pd_basic", "+per_role.decode.x={a: [1,2], b: 3}", "++y=1"],
        "b": ["cluster=1p1d"],
    }


def test_a_file_that_cannot_be_written_costs_no_systems_figures(compare, tmp_path, capsys):
    (tmp_path / "pd" / "requests.jsonl").mkdir(parents=True)
    (tmp_path / "reports.json").mkdir()
    with pytest.raises(SystemExit) as ended:
        compare.main(["--systems", "pd,1p1d", "--out", str(tmp_path), *WORDS, "seeds=1"])
    lines = str(ended.value).splitlines()
    assert [line.split(str(tmp_path))[1] for line in lines] == ["/pd/requests.jsonl'", "/reports.json'"]
    assert "1p1d" in capsys.readouterr().out and (tmp_path / "1p1d" / "report.json").is_file()


def test_what_is_about_to_run_is_said_before_it_does(compare, capsys):
    compare.main([*WORDS, "--systems", "pd", "seeds=1"])
    assert capsys.readouterr().err.startswith("systems: 1, runs in all: 1\n")
    cfg = compare.config_of(["cluster=colocated_2"])
    assert compare.plan_of({"a": cfg, "b": cfg}).startswith("systems: 2, runs in all: 6; the model computes every step")


def test_words_may_stand_on_both_sides_of_an_option(compare, capsys):
    compare.main([*WORDS, "--systems", "pd", "seeds=1"])
    assert "pd" in capsys.readouterr().out
