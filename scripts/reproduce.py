"""Figures of the paper, simulated: each point of each curve in virtual time, and what the paper has beside it.

python scripts/reproduce.py                          # names the figures
python scripts/reproduce.py fig8_loogle fig15        # tables of what a figure shows, then what the text says of it
python scripts/reproduce.py fig8_loogle --points 1,5 --curves PD,1P1D,1P1D-CC --out outputs/fig8
python scripts/reproduce.py fig15 --seeds 5          # the mean of five workloads, drawn anew, with their range
python scripts/reproduce.py fig15 workload.rate=30   # other arguments are words of run.py and hold for all points

A figure's options are in configs/experiment/, for run.py as +experiment=fig15; its curves in paper_figures.py.
Durations come from the paper's own figures (cost_model=h800_llama2_13b_vllm, link=nvlink_h800), and what it does not
say is chosen there: how curves relate can be compared, seconds at low load were fitted.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.figure
from matplotlib.axes import Axes
from options import integer, new_directory
from paper_figures import FIGURES, Curve, Figure, Shown
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from memserve.cluster.local import LocalCluster, check_playable
from memserve.compose import load_config
from memserve.config.blame import told
from memserve.metrics.figure_text import format_figure
from memserve.metrics.progress import Progress
from memserve.metrics.report import Report

Reports = dict[tuple[str, float], Report]  # by curve and point


def narrowed(figure: Figure, curves: Sequence[str] | None, points: Sequence[float] | None) -> Figure:
    """The same with these curves and points alone. Raises ValueError for a curve that it does not have."""
    names = [curve.name for curve in figure.curves]
    for name in curves or ():
        if name not in names:
            raise ValueError(f"--curves {name}: expected of {', '.join(names)}")
    kept = [curve for curve in figure.curves if curves is None or curve.name in curves]
    return dataclasses.replace(figure, curves=kept, points=figure.points if points is None else points)


def play(figure: Figure, words: Sequence[str], out: Path | None) -> Reports:
    """Every point's report, of several seeds the mean and the spread. All points are composed and checked before the
    first one runs.
    """
    points = sorted({*figure.points, *([0] if figure.is_relative else [])})
    configured = {
        (curve.name, point): load_config([f"+experiment={figure.name}", *curve.words, *curve.at(point), *words])
        for curve in figure.curves
        for point in points
    }
    for cfg in configured.values():
        check_playable(cfg)
    reports = {}
    for (curve, point), cfg in configured.items():
        with Progress(f"{curve} at {point:g}") as progress:
            where = None if out is None else out / f"{curve}-{point:g}"
            reports[curve, point] = LocalCluster(cfg).run(where, progress=progress)
    return reports


def value_of(figure: Figure, reports: Reports, shown: Shown, curve: Curve, point: float) -> float | None:
    return _share(figure, reports, shown, curve, _at(reports[curve.name, point], shown))


def range_of(
    figure: Figure, reports: Reports, shown: Shown, curve: Curve, point: float
) -> tuple[float | None, float | None]:
    """The least and the most of several seeds; of one seed its value, twice."""
    report = reports[curve.name, point]
    ends = [_at(report.get("spread", report), shown, end) for end in ("min", "max")]
    low, high = (_share(figure, reports, shown, curve, end) for end in ends)
    return low, high


def _share(figure: Figure, reports: Reports, shown: Shown, curve: Curve, value: float | None) -> float | None:
    """A value as the figure shows it: of a relative one its share of the curve's own at point 0."""
    if not figure.is_relative or value is None:
        return value
    whole = _at(reports[curve.name, 0], shown)
    return value / whole if whole else None


def _at(report: Report, shown: Shown, end: str = "") -> float | None:
    """What is shown of a report; of a spread the `end` of it, "min" or "max"."""
    found: Any = report
    for key in shown.path:
        found = found[key]
    found = found[end] if isinstance(found, dict) else found
    return None if found is None else float(found)


def paper_value(shown: Shown, curve: Curve, point: float) -> float | None:
    """What the paper has there, if it has anything."""
    return curve.paper.get(shown.label, {}).get(point)


def table_of(figure: Figure, reports: Reports, shown: Shown) -> Table:
    """A row for each point and a column for each curve: ours, and the paper's where there is one."""
    table = Table(title=f"{figure.title}: {shown.label}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column(figure.axis, justify="right")
    for curve in figure.curves:
        table.add_column(curve.name, justify="right")
    for point in figure.points:
        cells = []
        for curve in figure.curves:
            ours = _text(figure, reports, shown, curve, point)
            theirs = paper_value(shown, curve, point)
            cells.append(ours if theirs is None else f"{ours} ({format_figure(theirs, shown.unit)})")
        table.add_row(f"{point:g}", *cells)
    return table


def _text(figure: Figure, reports: Reports, shown: Shown, curve: Curve, point: float) -> str:
    """A value, and where there are several seeds its range."""
    values = (value_of(figure, reports, shown, curve, point), *range_of(figure, reports, shown, curve, point))
    mean_of_all, low, high = (format_figure(value, shown.unit) for value in values)
    return mean_of_all if low == high else f"{mean_of_all} [{low} .. {high}]"


def claims_of(figure: Figure, reports: Reports) -> Iterator[str]:
    """What the paper's text says, and the same change here."""
    for claim in figure.claims:
        (shown,) = (s for s in figure.shown if s.label == claim.label)
        if {(claim.curve, claim.point), (claim.base, claim.point)} <= set(reports):
            ours, base = (_at(reports[curve, claim.point], shown) for curve in (claim.curve, claim.base))
            change = f"{100 * (ours / base - 1):+.1f} %" if ours is not None and base else "-"
            yield (f"{claim.label} of {claim.curve} against {claim.base} at {claim.point:g}: {change} "
                   f"(paper: {claim.percent:+g} %)")  # fmt: skip


def distances_of(figure: Figure, reports: Reports) -> Iterator[str]:
    """How far what is shown is from the paper's values, over all of them that there are."""
    for shown in figure.shown:
        off = {}
        for curve in figure.curves:
            for point in figure.points:
                ours, theirs = value_of(figure, reports, shown, curve, point), paper_value(shown, curve, point)
                if ours is not None and theirs:
                    off[f"{curve.name} at {point:g}"] = abs(ours / theirs - 1)
        if off:
            where = max(off, key=off.__getitem__)
            yield (f"{shown.label}: off by {100 * mean(off.values()):.0f} % on average over {len(off)} values of the "
                   f"paper, by {100 * off[where]:.0f} % at most ({where})")  # fmt: skip


def drawn(figure: Figure, reports: Reports) -> matplotlib.figure.Figure:
    """A column for each thing shown: ours above, and below it, to the same scale, the paper's where there is any.

    Of several seeds the range is shaded.
    """
    rows = {"simulated here": partial(value_of, figure, reports)}
    if any(curve.paper for curve in figure.curves):
        rows["the paper"] = paper_value
    picture = matplotlib.figure.Figure(figsize=(3.4 * len(figure.shown), 2.8 * len(rows) + 0.4), layout="constrained")
    panels = picture.subplots(len(rows), len(figure.shown), squeeze=False, sharex=True, sharey="col")
    for (whose, value), row in zip(rows.items(), panels, strict=True):
        for panel, shown in zip(row, figure.shown, strict=True):
            for number, curve in enumerate(figure.curves):
                values = [value(shown, curve, point) for point in figure.points]
                _line(panel, figure.points, values, "os^Dv<>"[number % 7], color=f"C{number}", label=curve.name)
            panel.set_title(f"{shown.label}, {whose}")
    _shade(panels[0], figure, reports)
    for panel in panels[-1]:
        panel.set_xlabel(figure.axis)
        panel.set_ylim(bottom=0)  # of its whole column, now that all of it is there
    panels[0][0].legend(fontsize="x-small", ncols=2)
    picture.suptitle(figure.title)
    return picture


def _line(panel: Axes, points: Sequence[float], values: Sequence[float | None], marker: str, **more: Any) -> None:
    there = [(point, value) for point, value in zip(points, values, strict=True) if value is not None]
    if there:
        panel.plot(*zip(*there, strict=True), marker=marker, markersize=4, **more)


def _shade(panels: Sequence[Axes], figure: Figure, reports: Reports) -> None:
    """From the least to the most of several seeds, behind each line."""
    for panel, shown in zip(panels, figure.shown, strict=True):
        for number, curve in enumerate(figure.curves):
            ends = {point: range_of(figure, reports, shown, curve, point) for point in figure.points}
            there = [(point, low, high) for point, (low, high) in ends.items() if low is not None and high is not None]
            if any(low < high for _, low, high in there):
                points, lows, highs = zip(*there, strict=True)
                panel.fill_between(points, lows, highs, color=f"C{number}", alpha=0.2, linewidth=0)


def values_of(figure: Figure, reports: Reports) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """By label, curve and point: ours, the range of several seeds, and what the paper has."""

    def value(shown: Shown, curve: Curve, point: float) -> dict[str, Any]:
        ours, theirs = value_of(figure, reports, shown, curve, point), paper_value(shown, curve, point)
        return {"ours": ours, "range": range_of(figure, reports, shown, curve, point), "paper": theirs}

    return {
        shown.label: {
            curve.name: {f"{point:g}": value(shown, curve, point) for point in figure.points} for curve in figure.curves
        }
        for shown in figure.shown
    }


def reproduce(figure: Figure, words: Sequence[str], out: Path | None) -> None:
    """Runs and prints it; out: a directory for its picture, its values and the output directory of every point."""
    reports = play(figure, words, out)
    width = 20 if all("spread" not in report for report in reports.values()) else 44  # columns of a curve
    console = Console(width=max(100, 20 + width * len(figure.curves)))
    for shown in figure.shown:
        console.print(table_of(figure, reports, shown))
    for line in (*distances_of(figure, reports), *claims_of(figure, reports)):
        console.print(line, highlight=False)
    if out is not None:
        (out / "values.json").write_text(json.dumps(values_of(figure, reports), indent=2) + "\n", encoding="utf-8")
        drawn(figure, reports).savefig(out / "figure.png", dpi=120)
        print(f"written to {out}")


def numbers(word: str) -> list[float]:
    """For argparse's type=: whole ones stay whole, as some options must be."""
    return [int(part) if part.isdecimal() else float(part) for part in word.split(",")]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=lambda word: word.split(","), help="these alone, joined by commas")
    parser.add_argument("--points", type=numbers, help="these instead, joined by commas")
    parser.add_argument("--seeds", type=partial(integer, least=1), default=1, help="runs of a point; else %(default)s")
    parser.add_argument("--out", type=new_directory, help="a directory; each figure gets one of its own in it")
    parser.add_argument("words", nargs="*", help="figures, then words of run.py")
    args = parser.parse_intermixed_args(argv)
    names, words = [w for w in args.words if "=" not in w], [w for w in args.words if "=" in w]
    if not names:
        print("\n".join(f"{name}  {figure.title}" for name, figure in FIGURES.items()))
    try:
        for name in names:
            if name not in FIGURES:
                raise ValueError(f"{name}: expected of {', '.join(FIGURES)}, or a word of run.py with =")
        for name in names:
            figure, out = narrowed(FIGURES[name], args.curves, args.points), args.out and args.out / name
            reproduce(figure, [f"seeds={args.seeds}", *words], out)
    except (ValueError, OSError) as error:
        sys.exit(told(error))


if __name__ == "__main__":
    main(sys.argv[1:])
