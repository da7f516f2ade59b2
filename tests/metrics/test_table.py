import io
import re

import pytest
from msgspec.structs import replace
from rich.console import Console

from memserve import LocalCluster, load_config
from memserve.decisions import FetchRecord
from memserve.kvcache.ticket import TransferCounts
from memserve.metrics.comparison import print_comparison, print_points
from memserve.metrics.figure_text import format_figure
from memserve.metrics.formulas import Slo
from memserve.metrics.progress import Progress
from memserve.metrics.repeats import median_of
from memserve.metrics.report import InstanceStats, build_report
from memserve.metrics.table import print_report
from memserve.request import FinishReason, Role

INSTANCES = [InstanceStats("colocated-0", Role.COLOCATED, busy_ns=4_000_000_000)]


def console(**options) -> Console:
    return Console(file=io.StringIO(), width=100, color_system=None, **options)


def text(of: Console) -> str:
    return of.file.getvalue()


def make_report(make_timeline, **options):
    return build_report([make_timeline()], INSTANCES, wall_s=1.0, **options)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "seconds", "-"),
        (12.3456, "seconds", "12.3 s"),
        (2345.6, "seconds", "2,346 s"),
        (0.045678, "seconds", "45.7 ms"),
        (2.0, "seconds", "2.00 s"),
        (123.4, "seconds", "123 s"),
        (999.9, "seconds", "1,000 s"),
        (0.99999, "seconds", "1.00 s"),
        (0.00099999, "seconds", "1.00 ms"),
        (0.000012, "seconds", "12.0 us"),
        (0.0, "seconds", "0 s"),
        (-0.0005, "seconds", "-500 us"),
        (0.7345, "share", "73.5 %"),
        (1234567, "count", "1,234,567"),
        (2.5, "count", "2.5"),
        (51234.5, "number", "51,234"),
        (3.14159, "number", "3.142"),
    ],
)
def test_figures_are_shown_with_their_unit(value, unit, shown):
    assert format_figure(value, unit) == shown


def test_one_report_is_readable_at_100_columns(make_timeline):
    out = console()
    report = make_report(make_timeline, slo=Slo(2.0, 1.4, 1.9), turns_over_context=3, turns_not_sent=4)
    print_report(report, "a run", out)
    shown = text(out)
    for expected in ("a run", "TTFT", "phase queue", "1 of 1 finished", "40.0 %", "colocated-0", "goodput", "80.0 %"):
        assert expected in shown
    missed = "missed: 0 by TTFT <= 2.00 s, 1 by TPOT <= 1.40 s, 1 by longest ITL <= 1.90 s"
    assert f"0.0 %, 0 requests/s; {missed}" in " ".join(shown.split())
    (latencies,) = (line.split() for line in shown.splitlines() if line.strip().startswith("latency"))
    assert latencies == ["latency", "mean", "P50", "P90", "P95", "P99"]
    assert "turns over the context" in shown and "…" not in shown
    assert max(len(line) for line in shown.splitlines()) <= 100


def test_returns_that_come_too_late_are_named_with_what_to_do_once_they_are_more_than_a_tenth(make_timeline):
    timelines = [make_timeline(f"a/{number}") for number in range(10)]
    for num_overtaken, is_shown in ((0, False), (1, False), (2, True)):
        out = console()
        returns = TransferCounts(tokens=9, transfers=10, overtaken=num_overtaken)
        print_report(build_report(timelines, INSTANCES, wall_s=1.0, d_to_p=returns), "a run", out)
        shown = " ".join(text(out).split())
        assert ("after 2 of 10 answers (workload.think_time_s is how long" in shown) == is_shown


def test_prompt_tokens_that_were_computed_again_are_told_apart(make_timeline):
    for num_computed, said in ((60, "100: 40 cached, 0 fetched, 60 computed"),
                               (85, "100: 40 cached, 0 fetched, 85 computed (25 of them again)")):  # fmt: skip
        out = console()
        timeline = make_timeline(num_cached=40, num_computed=num_computed)
        print_report(build_report([timeline], INSTANCES, wall_s=1.0), "a run", out)
        (shown,) = (line for line in text(out).splitlines() if "prompt tokens" in line)
        assert shown.strip().endswith(said)


def test_what_is_said_to_be_computed_again_is_what_preemption_cost():
    words = ["exec=simulated", "workload=synthetic", "workload.num_sessions=20", "workload.rate=1000", "index=none",
             "workload.prompt_tokens=64", "workload.max_output_tokens=80", "kvcache.num_hbm_blocks=40"]  # fmt: skip
    result = LocalCluster(load_config(words)).run_once()
    tokens, preempted = result.report["tokens"], [t for t in result.timelines if t.stats.num_preemptions]
    again = sum(t.stats.num_computed - t.stats.num_prompt for t in preempted)
    assert again == tokens["computed"] - tokens["prompt"] > 0
    out = console()
    print_report(result.report, "a run", out)
    assert f"computed ({again:,} of them again)" in text(out)


def test_bytes_that_were_moved_in_vain_are_told_apart_where_there_are_any(make_timeline):
    for num_bytes, said in ((0, "9 MB in 10 transfers"), (3_000_000, "9 MB (3 of them in vain) in 10 transfers")):
        out = console()
        moved = TransferCounts(tokens=9, bytes=9_000_000, bytes_in_vain=num_bytes, transfers=10, failed=1)
        print_report(build_report([make_timeline()], INSTANCES, wall_s=1.0, p_to_d=moved), "a run", out)
        assert said in " ".join(text(out).split())


def test_how_busy_the_control_plane_was_is_shown_where_it_takes_time(make_timeline):
    for control in (None, {"busy_s": 1.0, "wait_s": {"mean": 0.001, "p99": 0.25}}):
        out = console()
        print_report(make_report(make_timeline, control=control), "a run", out)
        shown = " ".join(text(out).split())
        assert ("routing 1.00 s (20.0 %); requests waited 1.00 ms in the mean, 250 ms at P99" in shown) == bool(control)


def test_what_a_workload_says_of_itself_is_shown_but_for_what_is_none_or_zero(make_timeline):
    figures = {"format": "Mooncake", "hash_tokens": 512, "span_s": 3536.999, "missing": None, "skipped_empty": 0}
    for workload, shown in ((figures, ["workload format Mooncake, hash_tokens 512, span_s 3,536.999"]), ({}, [])):
        out = console()
        print_report(make_report(make_timeline, workload=workload), "a run", out)
        assert [" ".join(line.split()) for line in text(out).splitlines() if "workload" in line] == shown


def test_what_was_fetched_is_shown_beside_what_was_predicted_and_nothing_where_nobody_decided(make_timeline):
    times_ns = {"arrived_ns": 25_000_000, "ended_ns": 632_000_000}
    record = FetchRecord(1, 0, 64, 1, 0.023, 0.234, True, 0, **times_ns, outcome="fetched")
    timeline = make_timeline()
    timeline.stats = replace(timeline.stats, fetch=record)
    times = "632 ms, 23.0 ms predicted, 25.0 ms to the last byte; computing 234 ms predicted, 1 took longer"
    told = ["fetch or compute 1 fetched", f"time to fetch (P50) {times}"]
    for timelines, expected in (([timeline], told), ([make_timeline()], [])):
        out = console()
        print_report(build_report(timelines, INSTANCES, wall_s=1.0), console=out)
        shown = " ".join(text(out).split())
        assert all(line in shown for line in expected) and ("time to fetch" in shown) == bool(expected)


def test_an_instance_with_large_counts_fits_into_88_columns(make_timeline):
    report = make_report(make_timeline)
    row = report["instances"][0]
    row["tokens"] |= {"computed": 1234567, "generated": 765432}
    row |= {
        "id": "colocated-31",
        "num_requests": 2333,
        "busy_s": 1234.5,
        "preemptions": 123,
        "num_evicted_blocks": 77777,
        "peak_used_share": 0.983,
    }
    out = Console(file=io.StringIO(), width=88, color_system=None)
    print_report(report, console=out)
    (line,) = (line for line in text(out).splitlines() if "colocated-31" in line)
    for expected in ("2,333", "1,234 s", "80.0 %", "98 %", "1,234,567", "765,432", "123", "77,777"):
        assert expected in line


def test_an_empty_report_is_shown_too():
    out = console()
    print_report(build_report([], [], wall_s=0.0), console=out)
    assert "0 of 0 finished" in text(out)


def test_failures_are_named(make_timeline):
    out = console()
    failed = make_timeline("b/0", token_times=(), reason=FinishReason.REFUSED)
    print_report(build_report([failed], INSTANCES, wall_s=1.0), console=out)
    assert "0 of 1 finished; 1 refused" in text(out)


def test_reports_stand_side_by_side(make_timeline):
    out = console()
    fast = build_report([make_timeline(token_times=(1.5, 2.0), num_cached=90, num_computed=10)], INSTANCES, wall_s=1.0)
    print_comparison({"caching off": make_report(make_timeline), "caching on": fast}, "context caching", out)
    shown = text(out)
    rows = {cells[0]: cells[1:] for line in shown.splitlines() if len(cells := re.split(r"\s{2,}", line.strip())) == 3}
    assert rows["TTFT P50"] == ["2.00 s", "1.50 s"]
    assert rows["hit ratio"] == ["40.0 %", "90.0 %"]
    assert rows["prefill tokens computed"] == ["60", "10"]
    assert {"TPOT mean", "JCT P99", "output tokens/s"} <= rows.keys()


def test_a_figure_that_none_of_them_has_is_left_out(make_timeline):
    plain, asked = make_report(make_timeline), make_report(make_timeline, slo=Slo(2.0))
    for show, reports, there in (
        (print_comparison, {"a": plain}, False),
        (print_comparison, {"a": plain, "b": asked}, True),
        (print_points, {"a": plain}, False),
        (print_points, {"a": plain, "b": asked}, True),
    ):
        out = console()
        show(reports, console=out)
        assert ("good" in text(out)) == there and "100.0 %" * there in text(out)


def test_repeats_show_their_range(make_timeline):
    out = console()
    reports = [build_report([make_timeline(finished=end)], INSTANCES, wall_s=1.0) for end in (5.0, 9.0, 6.0)]
    print_comparison({"run": median_of(reports)}, console=out)
    assert "6.00 s (5.00 s .. 9.00 s)" in text(out) and "median of 3 repeats" in text(out)


def test_four_systems_fit_into_100_columns(make_timeline):
    out = console()
    report = make_report(make_timeline)
    print_comparison(dict.fromkeys(("caching off", "caching on", "least load", "affinity"), report), console=out)
    assert max(len(line) for line in text(out).splitlines()) <= 100 and "…" not in text(out)


def test_progress_prints_a_line_at_each_tenth_where_there_is_no_terminal():
    out = console(force_terminal=False)
    with Progress(console=out) as progress:
        progress.update(0, 0, 0.0)
        for finished in range(201):
            progress.update(finished, 200, finished / 10)
    lines = text(out).splitlines()
    assert len(lines) == 10
    assert lines[0] == "requests: 20 of 200, cluster time 2.0 s"
    assert lines[-1] == "requests: 200 of 200, cluster time 20.0 s"


def test_progress_starts_over_with_the_next_run():
    out = console(force_terminal=False)
    with Progress("turns", out) as progress:
        for finished in (0, 5, 10, 0, 5, 10):
            progress.update(finished, 10, 1.0)
    assert [line.split(",")[0] for line in text(out).splitlines()] == ["turns: 5 of 10", "turns: 10 of 10"] * 2


def test_progress_is_a_bar_on_a_terminal():
    out = Console(file=io.StringIO(), width=100, force_terminal=True, force_interactive=True)
    with Progress(console=out) as progress:
        progress.update(3, 4, 1.5)
    assert "3/4" in text(out) and "cluster time 1.5 s" in text(out)
