"""Whole runs of which a part is measured, held against what requests.jsonl and activity.jsonl say."""

import functools
import io
import json
from collections import Counter

import numpy as np
import pytest
from rich.console import Console

from memserve import LocalCluster, load_config
from memserve.metrics.comparison import print_comparison
from memserve.metrics.table import print_report

LOAD = ["exec=simulated", "workload=synthetic", "workload.num_sessions=24", "workload.num_turns=3", "workload.rate=20",
        "workload.prompt_tokens=200", "slo.ttft_s=.1", "slo.itl_s=.022"]  # fmt: skip
PART = ["measure.from_s=0.6", "measure.until_s=1.7"]
SYSTEMS = {
    "colocated": ["kvcache.num_hbm_blocks=150", "index=none"],
    "disaggregated": ["cluster=2p1d", "mode=pd_caching_3", "granularity=by_layer", "control.latency_s=.001",
                      "control.request_s=.0001", "workload.prefix_tokens=512"],
    "store": ["cluster.roles=[colocated,colocated,store]", "store=write_through", "fetch=cost",
              "+per_role.store.kvcache.num_dram_blocks=4096", "workload.prefix_tokens=512", "policy=random"],
    "migrating": ["cluster=colocated_4", "policy=prompt_tree", "rebalancing=by_answers", "workload.prefix_tokens=512"],
    "scaled": ["cluster=1p1d", "mode=pd_basic", "scaling=schedule", "scaling.changes=[{at_s: 1.0, add: decode},"
               "{at_s: 1.8, drain: decode-1}]"],
    "refusing": ["cluster=colocated_2", "rejection=early", "kvcache.num_hbm_blocks=150", "workload.rate=80",
                 "measure.from_s=.2", "measure.until_s=.9"],
    "of classes": ["queue=priority", "workload.classes=[{name: chat, share: .5, tpot_s: .014},"
                   "{name: batch, share: .5}]"],
}  # fmt: skip


def played(directory, *words):
    """The report, requests.jsonl and activity.jsonl of a run."""
    report = LocalCluster(load_config([*LOAD, *words])).run(directory)
    lines = [(directory / name).read_text().splitlines() for name in ("requests.jsonl", "activity.jsonl")]
    return report, *([json.loads(line) for line in part] for part in lines)


@functools.cache
def report_of(*words):
    """As JSON has it, without the time that it took."""
    report = LocalCluster(load_config([*LOAD, *words])).run()
    return {key: value for key, value in json.loads(json.dumps(report)).items() if key != "wall_s"}


def whole_of(system):
    return report_of(*SYSTEMS[system], "measure.from_s=null", "measure.until_s=null")


def leaves(tree, path=()):
    """(path, value) of every figure; rows of a list go by their number."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, key))
    else:
        yield path, tree


def is_listed(path, listed):
    """Whether a figure, or one that it lies under, is said to be of the whole run."""
    names = [part for part in path if isinstance(part, str)]
    return any(".".join(names[:n]) in listed for n in range(1, len(names) + 1))


def distributed(values):
    found = {"mean": np.mean(values), **{f"p{q}": np.quantile(values, q / 100) for q in (50, 90, 95, 99)}}
    return pytest.approx({name: float(value) for name, value in found.items()})


def gaps(record):
    return np.diff(record["token_times_s"]).tolist()


@pytest.mark.parametrize("system", SYSTEMS)
def test_figures_are_those_of_the_requests_that_arrived_in_it_and_of_what_happened_then(system, tmp_path):
    report, records, activity = played(tmp_path, *PART, *SYSTEMS[system])
    first_s = min(r["arrival_s"] for r in records)
    from_s, until_s = (first_s + report["measured"][key] for key in ("from_s", "until_s"))

    def then(time_s):
        return time_s is not None and from_s <= time_s < until_s

    own = [r for r in records if then(r["arrival_s"])]
    assert 0 < len(own) < len(records) and all(r["measured"] == (r in own) for r in records)
    assert (report["num_requests"], report["measured"]["num_left_out"]) == (len(own), len(records) - len(own))
    good_ends = ("stop", "length")
    ended = [r for r in own if r["finish_reason"] in good_ends]
    failures = Counter(r["finish_reason"] for r in own if r["finish_reason"] not in good_ends)
    assert report["num_finished"] == len(ended) and report["failures"] == failures
    for key in ("ttft_s", "tpot_s", "jct_s", "max_itl_s"):
        assert report[key] == distributed([r[key] for r in ended if r[key] is not None])
    assert report["itl_s"] == distributed([gap for r in ended for gap in gaps(r)])
    begun = [r for r in own if r["first_scheduled_s"] is not None]
    for name, key in (("prompt", "num_prompt"), ("computed", "num_computed"), ("generated", "num_generated"),
                      ("cached_local", "num_cached_local"), ("fetched", "num_fetched")):  # fmt: skip
        assert report["tokens"][name] == sum(r[key] for r in begun)
    found = sum(r["num_cached_local"] + r["num_fetched"] for r in begun)
    assert report["hit_ratio"] == pytest.approx(found / sum(r["num_prompt"] for r in begun))
    assert report["preemptions"] == sum(r["num_preemptions"] for r in begun)
    assert report["migrations"]["number"] == sum(m["done"] for r in own for m in r["migrations"])

    seconds = report["measured"]["seconds"]
    assert seconds == pytest.approx(min(until_s, max(r["finished_s"] for r in records)) - from_s)
    num_prompt = sum(r["num_prompt"] for r in records if then(r["prefill_end_s"]))
    num_tokens = sum(then(time_s) for r in records for time_s in r["token_times_s"])
    num_ends = sum(then(r["finished_s"]) and r["finish_reason"] in good_ends for r in records)
    assert report["throughput"] == pytest.approx({
        "output_tokens_per_s": num_tokens / seconds, "total_tokens_per_s": (num_prompt + num_tokens) / seconds,
        "requests_per_s": num_ends / seconds,
    })  # fmt: skip
    tpot_s = {"chat": 0.014}
    good = [r for r in ended if r["ttft_s"] <= 0.1 and max(gaps(r), default=0.0) <= 0.022
            and (r["tpot_s"] or 0.0) <= tpot_s.get(r["class"], 1e9)]  # fmt: skip
    assert report["goodput"]["num_good"] == len(good) < len(own)
    assert report["goodput"]["share"] == pytest.approx(len(good) / len(own))
    assert report["goodput"]["requests_per_s"] == pytest.approx(len(good) / seconds)

    until_s = from_s + seconds
    there_s = 0.0
    for row in report["instances"]:
        spans = [s for s in activity if s["instance"] == row["id"] and not s["to"]]
        busy_s = sum(max(min(s["end_s"], until_s) - max(s["start_s"], from_s), 0.0) for s in spans)
        left_s = until_s if row["left_s"] is None else min(row["left_s"], until_s)
        stay_s = max(left_s - max(row["joined_s"], from_s), 0.0)
        there_s += stay_s if row["role"] != "store" else 0.0
        assert row["busy_s"] == pytest.approx(busy_s, abs=1e-8)
        assert row["utilisation"] == (pytest.approx(busy_s / stay_s, abs=1e-8) if stay_s else None)
        theirs = [r for r in own if row["id"] in (r["instance"], r["decode_instance"])]
        assert row["num_requests"] == len(theirs) or system in ("scaled", "migrating")
    assert report["membership"]["instance_s"] == pytest.approx(there_s)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_figure_that_is_not_of_the_part_is_named(system):
    """Of a part in which nothing arrived and that has no time, there is nothing else."""
    whole, part = whole_of(system), report_of(*SYSTEMS[system], "measure.from_s=1000", "measure.until_s=null")
    listed, values = part["measured"]["whole_run"], dict(leaves(whole))
    assert {name.split(".")[0] for name in listed} <= part.keys() | {"wall_s"}
    for path, value in leaves({key: part[key] for key in part if key != "measured"}):
        if is_listed(path, listed):
            assert value == values[path], path
        elif path[-1] not in ("id", "role") and "slo" not in path:
            assert value is None or value == 0, path


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_part_that_has_all_of_a_run_gives_its_figures(system):
    whole, part = whole_of(system), report_of(*SYSTEMS[system], "measure.from_s=0", "measure.until_s=null")
    assert part["measured"]["num_left_out"] == 0 and whole["measured"] is None
    assert part | {"measured": None} == whole


@pytest.mark.parametrize("system", ["disaggregated", "migrating"])
def test_macro_steps_do_not_change_what_a_part_has(system):
    on, off = (report_of(*PART, *SYSTEMS[system], f"macro_steps={word}") for word in ("on", "off"))
    assert on == off and on["measured"]["num_left_out"] > 0


def test_each_seed_has_a_part_of_its_own_run(tmp_path):
    several, records, _ = played(tmp_path, *PART, "seeds=2")
    alone = [report_of(*PART, f"seed={seed}") for seed in (0, 1)]
    assert several["jct_s"]["p95"] == pytest.approx(np.mean([report["jct_s"]["p95"] for report in alone]))
    numbers = [report["measured"]["num_requests"] for report in alone]
    assert several["measured"]["num_requests"] == np.mean(numbers) and numbers[0] != numbers[1]
    assert several["measured"]["whole_run"] == alone[0]["measured"]["whole_run"]
    assert sum(record["measured"] for record in records) == numbers[1]


def test_the_tables_say_what_is_measured():
    report, whole = report_of(*PART) | {"wall_s": 1.0}, report_of()
    out = Console(file=io.StringIO(), width=100)
    print_report(report, console=out)
    left_out = report["measured"]["num_left_out"]
    shown = " ".join(out.file.getvalue().split())
    assert f"measured 600 ms to 1.70 s; left out: {left_out} that arrived before or after" in shown
    assert "of the whole run KV moved" in shown
    assert max(len(line) for line in out.file.getvalue().splitlines()) <= 100
    for reports, there in (({"whole": whole, "part": report}, True), ({"whole": whole}, False)):
        out = Console(file=io.StringIO(), width=100)
        print_comparison(reports, console=out)
        assert ("measured from" in out.file.getvalue()) == ("requests left out" in out.file.getvalue()) == there
