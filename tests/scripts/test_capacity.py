"""capacity.py finds the load at which a system still answers well, and refuses what has no answer before it runs."""

import json
import math

import pytest

from memserve.cluster.local import LocalCluster
from memserve.compose import load_config

WORDS = ["exec=simulated", "tokens=workload", "workload=synthetic", "workload.num_sessions=60",
         "workload/lengths=fixed"]  # fmt: skip


@pytest.fixture
def capacity(script):
    return script("capacity")


@pytest.mark.parametrize("limit", [0.02, 0.7, 1.0, 3.9, 4.0, 700.0])
@pytest.mark.parametrize("start", [0.25, 1.0, 64.0])
def test_the_limit_is_between_what_holds_and_what_does_not(capacity, limit, start):
    tried = []

    def holds(load):
        tried.append(load)
        return load <= limit

    good, bad = capacity.narrow(holds, start, precision=0.02)
    assert good <= limit < bad <= good * 1.02
    assert len(tried) == len(set(tried)) <= 24


def test_where_nothing_or_everything_holds_one_end_is_missing(capacity):
    assert capacity.narrow(lambda load: True, 1.0, 0.05, doublings=3) == (8.0, None)
    assert capacity.narrow(lambda load: False, 1.0, 0.05, doublings=3) == (None, 0.125)


def test_systems_stand_side_by_side_and_the_loads_found_are_right(capacity, tmp_path, capsys):
    more = ["--share", ".8", "--precision", ".2", "--start", "8", "--seeds", "0,1", "--out", str(tmp_path / "new")]
    systems = "off:index=none,on:index=radix+workload.num_turns=2"
    capacity.main(["--systems", systems, *more, *WORDS, "slo.jct_s=.6"])
    out = capsys.readouterr().out
    assert "most workload.rate" in out and "jct" in out and "off at 8: " in out
    found = json.loads((tmp_path / "new" / "capacity.json").read_text(encoding="utf-8"))
    assert (found["share"], found["seeds"], found["vary"]) == (0.8, [0, 1], "workload.rate")
    assert (tmp_path / "new" / "capacity.png").stat().st_size > 1000
    system = found["systems"]["off"]
    shares = {point["load"]: point["report"]["goodput"]["share"] for point in system["points"]}
    assert shares[system["holds"]] >= 0.8 > shares[system["fails"]]
    assert system["holds"] < system["fails"] <= 1.2 * system["holds"]
    words = [*WORDS, "index=none", "slo.jct_s=.6", f"workload.rate={system['holds']}"]
    runs = [LocalCluster(load_config([*words, f"seed={seed}"])).run() for seed in (0, 1)]
    assert sum(run["goodput"]["share"] for run in runs) / 2 == pytest.approx(shares[system["holds"]])


def test_what_holds_is_divided_and_compared_by_the_ranks_of_instances_that_serve(capacity, tmp_path, capsys):
    one = "one:cluster=1p1d+mode=pd_basic"
    split = f"split{one[3:]}+cluster.tensor_parallel.decode=4"
    words = ["exec=simulated", "tokens=workload", "workload=synthetic", "workload.num_sessions=4", "geometry=llama3_8b"]
    capacity.main(["--systems", f"{one},{split}", "--precision", "10", "--out", str(tmp_path), *words, "slo.jct_s=20"])
    systems = json.loads((tmp_path / "capacity.json").read_text(encoding="utf-8"))["systems"]
    assert [system["num_ranks"] for system in systems.values()] == [2, 5]
    printed = capsys.readouterr().out.replace(",", "").splitlines()
    rows = [line.split() for line in printed if line.split()[:1] in (["one"], ["split"])]
    loads = [float(row[2 if row[1] == ">=" else 1]) for row in rows if row[1] != "at"]
    shares, ratios = ([float(row[at + (row[1] == ">=")]) for row in rows if row[1] != "at"] for at in (2, 3))
    assert shares == [pytest.approx(load / ranks, rel=0.05) for load, ranks in zip(loads, (2, 5), strict=True)]
    assert ratios == [1.0, pytest.approx(shares[1] / shares[0], rel=0.05)]


def test_of_several_seeds_the_share_is_of_all_requests_however_many_each_had(capacity):
    def report(num_good, num_requests):
        return {"num_requests": num_requests, "goodput": {"num_good": num_good, "share": num_good / num_requests}}

    assert capacity.together([report(1, 1), report(10, 99)], [0, 1])["goodput"]["share"] == 0.11
    assert capacity.share_of(capacity.together([report(3, 4)], [0])) == 0.75


def test_what_nothing_can_overload_is_said_to_hold_everything(capacity, capsys):
    capacity.main(["--systems", "pd_cc", *WORDS, "workload.num_sessions=2", "slo.jct_s=100"])
    out = capsys.readouterr().out
    assert ">= 4096" in out and "pd_cc: all sessions came within 488 us, and a request takes" in out


def test_with_a_window_the_sessions_are_as_many_as_come_in_it(capacity, tmp_path, capsys):
    more = ["--window", "2", "--precision", ".5", "--start", "64", "--out", str(tmp_path)]
    capacity.main(["--systems", "pd", *more, *WORDS, "slo.ttft_s=.1", "workload.max_output_tokens=8"])
    points = json.loads((tmp_path / "capacity.json").read_text(encoding="utf-8"))["systems"]["pd"]["points"]
    assert len(points) > 1
    assert all(point["report"]["num_sessions"] == math.ceil(2 * point["load"]) for point in points)
    assert "try a longer --window" not in capsys.readouterr().out


def test_of_a_load_the_share_is_of_the_requests_that_are_measured(capacity, tmp_path):
    more = ["--window", "2", "--precision", "1", "--start", "64", "--seeds", "0,1", "--out", str(tmp_path)]
    part = ["measure.from_s=.5", "measure.until_s=1.5", "slo.itl_s=.5", "workload.max_output_tokens=8"]
    capacity.main(["--systems", "pd", *more, *WORDS, *part, "slo.ttft_s=.1"])
    points = json.loads((tmp_path / "capacity.json").read_text(encoding="utf-8"))["systems"]["pd"]["points"]
    for report in (point["report"] for point in points):
        assert 0 < report["num_requests"] < report["num_sessions"] and report["measured"]["from_s"] == 0.5
        assert report["goodput"]["share"] == report["goodput"]["num_good"] / report["num_requests"]


def test_a_load_of_which_no_request_is_measured_ends_the_search(capacity):
    with pytest.raises(
        SystemExit, match=r"pd at 1: no request arrived between measure.from_s= and .* a longer --window"
    ):
        capacity.main(["--systems", "pd", *WORDS, "slo.ttft_s=1", "--window", "5", "measure.from_s=10"])


def test_what_no_load_is_low_enough_for_is_said_to_hold_none(capacity, capsys):
    capacity.main(["--systems", "pd_cc", *WORDS, "workload.num_sessions=2", "slo.ttft_s=.000001"])
    out = capsys.readouterr().out
    assert "none" in out and "0.0 %, ttft" in out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "at least one of slo.ttft_s="),
        (["slo.ttft_s=1", "--share", "1.5"], r"--share=1.5: expected a number in \(0, 1\]"),
        (["slo.ttft_s=1", "--start", "0"], "--start=0.0: expected a number > 0"),
        (["slo.ttft_s=1", "--precision", "0"], "--precision=0.0: expected a number in"),
        (["slo.ttft_s=1", "--vary", "workload.speedup"], "--vary=workload.speedup: expected an option that pd has"),
        (["slo.ttft_s=1", "--window", "0"], "--window=0.0: expected seconds > 0"),
        (["slo.ttft_s=1", "--window", "9", "--vary", "workload.num_turns"], "--window=9.0 contradicts --vary=workload"),
        (["slo.ttft_s=1", "--systems", "2p"], "2p: expected one of pd"),
        (["slo.ttft_s=1", "exec=distributed"], "exec=distributed"),
        (["slo.ttft_s=1", "seed=3"], "seed=3 contradicts --seeds"),
        (["slo.ttft_s=1", "workload.rate=3"], "workload.rate=3 contradicts --vary"),
        (["slo.ttft_s=1", "--vary", "seed"], "--vary=seed: expected an option that is a load"),
        (["slo.ttft_s=1", "--systems", "pd,a:cluster=1p1d"], "mode=colocated contradicts .*; expected colocated"),
    ],
)
def test_what_has_no_answer_is_refused_before_anything_runs(capacity, capsys, words, named):
    with pytest.raises(SystemExit, match=named):
        capacity.main([*WORDS, *words])
    assert "good" not in capsys.readouterr().out


def test_seeds_are_whole_numbers(capacity, capsys):
    with pytest.raises(SystemExit):
        capacity.main([*WORDS, "slo.ttft_s=1", "--seeds", "0,x"])
    assert "0,x: expected integers >= 0, joined by commas" in capsys.readouterr().err


def test_each_request_counts_by_the_objectives_of_its_class(capacity, tmp_path, capsys):
    classes = "workload.classes=[{{name: chat, share: .5, {}}}, {{name: batch, share: .5, priority: 1}}]"
    more = ["--share", ".75", "--precision", ".5", "--start", "8", "--systems"]
    capacity.main([*more, "fcfs:queue=fcfs,priority:queue=priority", *WORDS, "sched.max_running=4",
                   "workload.num_sessions=300", "--out", str(tmp_path), classes.format("ttft_s: .1")])  # fmt: skip
    found = json.loads((tmp_path / "capacity.json").read_text(encoding="utf-8"))["systems"]
    assert found["priority"]["holds"] > found["fcfs"]["holds"]
    for system in found.values():
        for point in system["points"]:
            report = point["report"]
            bad = report["classes"]["chat"]["num_requests"] - report["classes"]["chat"]["goodput"]["num_good"]
            assert report["goodput"]["num_good"] == report["num_requests"] - bad
    assert "ttft" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"slo: expected at least one of .* or one of a class in workload.classes"):
        capacity.main([*more, "pd", *WORDS, classes.format("priority: 2")])
