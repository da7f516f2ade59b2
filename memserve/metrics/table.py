"""Table: one run's report for people, in full. Knows the report's keys; computes nothing."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from memserve.metrics.figure_text import counted, format_figure
from memserve.metrics.moved_text import moved_texts
from memserve.metrics.repeats import of_what
from memserve.metrics.report import Report

WIDTH = 100  # columns, where the output is no terminal
_LATENCIES = {
    "TTFT": "ttft_s",
    "second token": "second_token_s",
    "TPOT": "tpot_s",
    "ITL": "itl_s",
    "longest ITL": "max_itl_s",
    "JCT": "jct_s",
}
_STATISTICS = {"mean": "mean", "P50": "p50", "P90": "p90", "P95": "p95", "P99": "p99"}
_OBJECTIVES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "longest ITL", "jct_s": "JCT"}


def report_tables(report: Report, title: str = "") -> Group:
    """One run in full: latencies, totals, instances."""
    return Group(_latency_table(report, title), "", _totals_table(report), "", _instance_table(report))


def print_report(report: Report, title: str = "", console: Console | None = None) -> None:
    """Prints one run's report; console: None is standard output."""
    (console or standard_output()).print(report_tables(report, title))


def standard_output() -> Console:
    """A terminal as wide as it is, or else WIDTH columns."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def plain_table(title: str = "", *, show_header: bool = True) -> Table:
    """An empty one in the style of all of them."""
    return Table(
        title=escape(title) or None,  # a word of a command line may have brackets
        title_justify="left",
        title_style="bold",
        show_header=show_header,
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        show_edge=False,
    )


def _latency_table(report: Report, title: str) -> Table:
    table = plain_table(title)
    table.add_column("latency", no_wrap=True)
    for statistic in _STATISTICS:
        table.add_column(statistic, justify="right")
    for name, key in _LATENCIES.items():
        table.add_row(name, *(format_figure(report[key][s], "seconds") for s in _STATISTICS.values()))
    table.add_section()
    for name, phase in report["phases_s"].items():
        table.add_row(f"phase {name}", *(format_figure(phase[s], "seconds") for s in _STATISTICS.values()))
    return table


def _totals_table(report: Report) -> Table:
    """Counts of the run, two columns; what is zero for want of any failure is left out."""
    tokens = report["tokens"]
    rows = {
        **({"figures": said} if (said := of_what(report)) else {}),
        "requests": _requests_text(report),
        **_measured_text(report["measured"]),
        **_workload_text(report["workload"]),
        "prompt tokens": _prompt_text(tokens),
        "hit ratio": format_figure(report["hit_ratio"], "share"),
        **moved_texts(report),
        "tokens generated": counted(tokens["generated"]),
        **_in_vain_text(tokens),
        **_near_ties_text(report["near_ties"]),
        "output tokens/s": format_figure(report["throughput"]["output_tokens_per_s"], "number"),
        **_goodput_text(report["goodput"]),
        **_classes_text(report["classes"]),
        **_membership_text(report["membership"]),
        **_migrations_text(report["migrations"]),
        **_control_text(report["control"]),
        "makespan": format_figure(report["makespan_s"], "seconds"),
        "wall time": format_figure(report["wall_s"], "seconds"),
    }
    for label, key in (("turns over the context", "turns_over_context"), ("turns not sent", "turns_not_sent")):
        if report[key]:
            rows[label] = counted(report[key])
    table = plain_table(show_header=False)
    for label, text in rows.items():
        table.add_row(label, text)
    return table


def _prompt_text(tokens: Mapping[str, int]) -> str:
    """Where prompts came from. After a preemption tokens are computed again, those of the answer so far among them."""
    cached, fetched, computed = (tokens[key] for key in ("cached_local", "fetched", "computed"))
    num_again, on_decode = tokens["computed_again"], tokens["computed_on_decode"]
    again = f" ({counted(num_again)} of them again)" if num_again > 0 else ""
    parts = f"{counted(cached)} cached, {counted(fetched)} fetched, {counted(computed)} computed{again}"
    return f"{counted(tokens['prompt'])}: {parts}{f', {counted(on_decode)} again on decode' if on_decode else ''}"


def _in_vain_text(tokens: Mapping[str, int]) -> dict[str, str]:
    """What was computed for attempts that were given up, if anything was."""
    computed, generated = tokens["computed_in_vain"], tokens["generated_in_vain"]
    text = f"{counted(computed)} computed, {counted(generated)} generated"
    return {"tokens in vain": text} if computed or generated else {}


def _near_ties_text(near_ties: float | None) -> dict[str, str]:
    """Tokens that rounding alone might have chosen, if there were any that somebody counted."""
    return {"near ties": counted(near_ties)} if near_ties else {}


def _goodput_text(goodput: Report | None) -> dict[str, str]:
    """What was answered within the objectives, if there are any; and how many answers missed which."""
    if goodput is None:
        return {}
    share, rate = format_figure(goodput["share"], "share"), format_figure(goodput["requests_per_s"], "number")
    missed = ", ".join(
        f"{counted(goodput['missed'][key])} by {_OBJECTIVES[key]} <= {format_figure(bound, 'seconds')}"
        for key, bound in goodput["slo"].items()
        if bound is not None
    )
    return {"goodput": f"{share}, {rate} requests/s{'; missed: ' * bool(missed)}{missed}"}


def _classes_text(classes: Report | None) -> dict[str, str]:
    """Each class's answers, and how many of them were within its objectives, if it has any."""
    return {f"class {name}": "; ".join(_class_texts(figures)) for name, figures in (classes or {}).items()}


def _class_texts(figures: Report) -> Iterator[str]:
    yield f"{counted(figures['num_finished'])} of {counted(figures['num_requests'])} finished"
    for name in ("TTFT", "TPOT", "JCT"):
        mean, p99 = (format_figure(figures[_LATENCIES[name]][statistic], "seconds") for statistic in ("mean", "p99"))
        yield f"{name} {mean} (P99 {p99})"
    yield from (f"goodput {text}" for text in _goodput_text(figures["goodput"]).values())


def _membership_text(m: Mapping[str, float]) -> dict[str, str]:
    """Who came and went, and for how long instances were there together, if anybody did."""
    changes = ", ".join(f"{counted(m[key])} {key}" for key in ("joined", "left", "lost") if m[key])
    left = f", {counted(m['bequeathed_tokens'])} tokens left to others" * bool(m["bequeathed_tokens"])
    return {"instances": f"{changes}; {format_figure(m['instance_s'], 'seconds')} in all{left}"} if changes else {}


def _migrations_text(m: Mapping[str, Any]) -> dict[str, str]:
    """Answers that went on elsewhere, if any were to."""
    failed = f", {counted(m['failed'])} failed" * bool(m["failed"])
    ahead = f" ({counted(m['ahead_tokens'])} ahead)" * bool(m["ahead_tokens"])
    mean, most = (format_figure(m["stood_still_s"][key], "seconds") for key in ("mean", "max"))
    moved = f"{counted(m['number'])}, {counted(m['tokens'])} tokens{ahead}{failed}"
    text = f"{moved}; stood still {mean} in the mean, {most} at most"
    return {"migrations": text} if m["number"] or m["failed"] else {}


def _control_text(control: Report | None) -> dict[str, str]:
    """How busy the global scheduler was, if routing and messages take time."""
    if control is None:
        return {}
    mean, p99 = (format_figure(control["wait_s"][key], "seconds") for key in ("mean", "p99"))
    busy = f"{format_figure(control['busy_s'], 'seconds')} ({format_figure(control['utilisation'], 'share')})"
    return {"routing": f"{busy}; requests waited {mean} in the mean, {p99} at P99"}


def _requests_text(report: Report) -> str:
    text = f"{counted(report['num_finished'])} of {counted(report['num_requests'])} finished"
    failures = ", ".join(f"{counted(n)} {reason}" for reason, n in report["failures"].items())
    return f"{text}; {failures}" if failures else text


def _measured_text(measured: Report | None) -> dict[str, str]:
    """Which part of the run is measured, if not all of it, and what beside it is of all."""
    if measured is None:
        return {}
    from_s, until_s = (measured[key] for key in ("from_s", "until_s"))
    until = "the end" if until_s is None else format_figure(until_s, "seconds")
    failed = f", {counted(measured['num_left_out_failed'])} of them failed" * bool(measured["num_left_out_failed"])
    left_out = f"{counted(measured['num_left_out'])} that arrived before or after{failed}"
    return {
        "measured": f"{format_figure(from_s or 0.0, 'seconds')} to {until}; left out: {left_out}",
        "of the whole run": "KV moved, the store, tokens in vain, routing, KV peak, evictions",
    }


def _workload_text(figures: Mapping[str, Any]) -> dict[str, str]:
    """What the workload says of itself, but for what is none or zero."""
    texts = {key: value if isinstance(value, str) else f"{value:,.12g}" for key, value in figures.items() if value}
    return {"workload": ", ".join(f"{key} {text}" for key, text in texts.items())} if texts else {}


def _instance_table(report: Report) -> Table:
    table = plain_table()
    table.add_column("instance", no_wrap=True)
    for heading in ("reqs", "busy", "util", "KV\npeak", "hits", "computed", "output", "pre-\nempted", "evict"):
        table.add_column(heading, justify="right", overflow="fold")
    anybody_waited = any(row["peak_waiting_handoffs"] for row in report["instances"])
    if anybody_waited:
        table.add_column("most\nwaiting", justify="right")
    for row in report["instances"]:
        table.add_row(
            row["id"] + _stay_text(row),
            counted(row["num_requests"]),
            format_figure(row["busy_s"], "seconds"),
            format_figure(row["utilisation"], "share"),
            format_figure(row["peak_used_share"], "percent"),
            format_figure(row["hit_ratio"], "share"),
            counted(row["tokens"]["computed"]),
            counted(row["tokens"]["generated"]),
            counted(row["preemptions"]),
            counted(row["num_evicted_blocks"]),
            *([counted(row["peak_waiting_handoffs"])] if anybody_waited else []),
        )
    return table


def _stay_text(row: Mapping[str, float | None]) -> str:
    """From when until when an instance was there, if that was not always, on a line of its own."""
    joined_s, left_s = row["joined_s"], row["left_s"]
    since = f"from {format_figure(joined_s, 'seconds')}" if joined_s else ""
    until = f"to {format_figure(left_s, 'seconds')}" if left_s is not None else ""
    return f"\n ({', '.join(filter(None, (since, until)))})" if since or until else ""
