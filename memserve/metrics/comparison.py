"""Comparison: reports of several runs side by side, for people. Knows the report's keys; computes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from memserve.metrics.figure_text import format_figure
from memserve.metrics.repeats import of_what
from memserve.metrics.report import Report
from memserve.metrics.table import plain_table, standard_output


@dataclass(frozen=True)
class _Row:
    """A line of a comparison: where its figure stands in a report, and in which unit it is shown."""

    label: str
    path: tuple[str, ...]
    unit: str


_COMPARED = (
    _Row("requests finished", ("num_finished",), "count"),
    _Row("requests failed", ("num_failed",), "count"),
    _Row("measured from", ("measured", "from_s"), "seconds"),
    _Row("measured until", ("measured", "until_s"), "seconds"),
    _Row("requests left out", ("measured", "num_left_out"), "count"),
    *(
        _Row(f"{name} {statistic}", (key, statistic.lower()), "seconds")
        for name, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("JCT", "jct_s"))
        for statistic in ("mean", "P50", "P99")
    ),
    _Row("second token mean", ("second_token_s", "mean"), "seconds"),
    *(
        _Row(f"{phase.replace('_', ' ')} mean", ("phases_s", phase, "mean"), "seconds")
        for phase in ("ask_wait", "grant_wait", "transfer", "decode_queue")
    ),
    _Row("hit ratio", ("hit_ratio",), "share"),
    _Row("prompt tokens", ("tokens", "prompt"), "count"),
    _Row("prefill tokens computed", ("tokens", "computed"), "count"),
    _Row("tokens P -> D", ("transfers", "p_to_d", "tokens"), "count"),
    _Row("MB P -> D", ("transfers", "p_to_d", "bytes"), "mega"),
    _Row("of these in vain", ("transfers", "p_to_d", "bytes_in_vain"), "mega"),
    _Row("transfers P -> D", ("transfers", "p_to_d", "transfers"), "count"),
    _Row("network calls P -> D", ("transfers", "p_to_d", "calls"), "count"),
    _Row("tokens D -> P", ("transfers", "d_to_p", "tokens"), "count"),
    _Row("MB D -> P", ("transfers", "d_to_p", "bytes"), "mega"),
    _Row("network calls D -> P", ("transfers", "d_to_p", "calls"), "count"),
    _Row("tokens within a role", ("transfers", "between", "tokens"), "count"),
    _Row("MB within a role", ("transfers", "between", "bytes"), "mega"),
    _Row("tokens found in the store", ("store", "fetched_tokens"), "count"),
    _Row("MB to the store", ("store", "received", "bytes"), "mega"),
    _Row("MB from the store", ("store", "sent", "bytes"), "mega"),
    _Row("fetched, evicted before use", ("fetches", "unused_tokens"), "count"),
    _Row("fetched slower than computed", ("fetches", "slower_than_computing"), "count"),
    _Row("time to fetch P50", ("fetches", "actual_s", "p50"), "seconds"),
    _Row("to its last byte P50", ("fetches", "arrived_s", "p50"), "seconds"),
    _Row("predicted to fetch P50", ("fetches", "predicted_s", "p50"), "seconds"),
    _Row("tokens generated", ("tokens", "generated"), "count"),
    _Row("near ties", ("near_ties",), "count"),
    _Row("output tokens/s", ("throughput", "output_tokens_per_s"), "number"),
    _Row("good answers", ("goodput", "share"), "share"),
    _Row("good answers/s", ("goodput", "requests_per_s"), "number"),
    _Row("time of instances", ("membership", "instance_s"), "seconds"),
    _Row("skew (busiest / mean)", ("skew", "busy_s"), "number"),
    _Row("requests, busiest / mean", ("routing", "skew_requests"), "number"),
    _Row("sent to the soonest", ("routing", "soonest_ratio"), "share"),
    _Row("predicted later than there", ("routing", "mean_regret_s"), "seconds"),
    _Row("wrong hits", ("routing", "wrong_hit_ratio"), "share"),
    _Row("tokens of wrong hits", ("routing", "wrong_hit_tokens"), "count"),
    _Row("makespan", ("makespan_s",), "seconds"),
)

_POINTS = (
    _Row("finished", ("num_finished",), "count"),
    _Row("failed", ("num_failed",), "count"),
    _Row("TTFT mean", ("ttft_s", "mean"), "seconds"),
    _Row("TTFT P99", ("ttft_s", "p99"), "seconds"),
    _Row("TPOT mean", ("tpot_s", "mean"), "seconds"),
    _Row("JCT mean", ("jct_s", "mean"), "seconds"),
    _Row("hit ratio", ("hit_ratio",), "share"),
    _Row("good", ("goodput", "share"), "share"),
)


def comparison_table(reports: Mapping[str, Report], title: str = "") -> Table:
    """Systems side by side: a column for each report, under its name. Several runs show their range too."""
    table = plain_table(title)
    table.add_column("", no_wrap=True)
    for name in reports:
        table.add_column(escape(name), justify="right", overflow="fold")
    for label, *cells in comparison_rows(reports):
        table.add_row(label, *cells)
    return table


def comparison_rows(reports: Mapping[str, Report]) -> list[list[str]]:
    """What is compared: the name of a figure that any of them has, and it in each report, as text."""
    shown = _had(reports, (*_COMPARED, *_of_classes(reports)))
    said = [of_what(report) for report in reports.values()]
    runs = [["figures", *said]] if any(said) else []
    return runs + [[row.label, *(_cell(report, row) for report in reports.values())] for row in shown]


def print_points(reports: Mapping[str, Report], title: str = "", console: Console | None = None) -> None:
    """Prints a row for each report of a sweep; console: None is standard output."""
    table = plain_table(title)
    table.add_column("point", overflow="fold")
    shown = _had(reports, _POINTS)
    for row in shown:
        table.add_column(row.label, justify="right")
    for name, report in reports.items():
        table.add_row(escape(name), *(_cell(report, row) for row in shown))
    (console or standard_output()).print(table)


def print_comparison(reports: Mapping[str, Report], title: str = "", console: Console | None = None) -> None:
    """Prints reports side by side; console: None is standard output."""
    (console or standard_output()).print(comparison_table(reports, title))


def _of_classes(reports: Mapping[str, Report]) -> list[_Row]:
    """What is compared of each class that any of them has."""
    names = dict.fromkeys(name for report in reports.values() for name in report.get("classes") or {})
    return [
        _Row(f"{name}: {label}", ("classes", name, *path), unit)
        for name in names
        for label, path, unit in (
            ("finished", ("num_finished",), "count"),
            ("TTFT mean", ("ttft_s", "mean"), "seconds"),
            ("TTFT P99", ("ttft_s", "p99"), "seconds"),
            ("TPOT mean", ("tpot_s", "mean"), "seconds"),
            ("JCT mean", ("jct_s", "mean"), "seconds"),
            ("good answers", ("goodput", "share"), "share"),
            ("good answers/s", ("goodput", "requests_per_s"), "number"),
        )
    ]


def _had(reports: Mapping[str, Report], rows: Sequence[_Row]) -> list[_Row]:
    """Those of `rows` that any report has a figure of."""
    return [row for row in rows if any(value_at(report, row.path) is not None for report in reports.values())]


def _cell(report: Report, row: _Row) -> str:
    text = format_figure(value_at(report, row.path), row.unit)
    spread = value_at(report.get("spread", {}), row.path)
    if spread is None:
        return text
    low, high = (format_figure(spread[end], row.unit) for end in ("min", "max"))
    return text if low == high else f"{text} ({low} .. {high})"


def value_at(tree: Any, path: tuple[str, ...]) -> Any:
    """What stands at `path`, or None where there is no such place."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
