"""Plots: figures made of what a run left behind. Knows no file: samples in, a Figure out, without a display."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memserve.metrics.occupancy import KINDS, TIERS, Sample
from memserve.request import FinishReason

COLOURS = {
    "request": "#1f4e9c",
    "both": "#5b9bd5",
    "index": "#f2b134",
    "swap": "#3a9d5d",
    "transfer": "#7b3fa0",
    "quarantine": "#c0392b",
    "free": "#eeeeee",
}
LABELS = {
    "request": "requests alone",
    "both": "requests, and cached",
    "index": "cached alone",
    "swap": "swaps",
    "transfer": "transfers",
    "quarantine": "quarantine",
    "free": "free",
}

SHADES = colormaps["Blues"]
LATENCIES = {"TTFT": "ttft_s", "TPOT": "tpot_s", "JCT": "jct_s"}


def draw_latencies(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Cumulative distributions of the latencies that are measured, of the requests that succeeded; a line a run.

    runs: each run's records of requests.jsonl under the name that is shown for it; a null latency is left out, and one
    that does not say whether it is measured (as records once did not) is in.
    """
    figure = Figure(figsize=(4.2 * len(LATENCIES), 3.2), layout="constrained")
    for panel, (name, key) in zip(figure.subplots(1, len(LATENCIES)), LATENCIES.items(), strict=True):
        for label, records in runs.items():
            values = np.sort([record[key] for record in records if _counts(record) and record[key] is not None])
            panel.step(values, np.arange(1, len(values) + 1) / max(len(values), 1), where="post", label=label)
        panel.set_title(name, fontsize="small")
        panel.set_xlabel("seconds")
        panel.set_ylim(0, 1.02)
        panel.locator_params(axis="x", nbins=5)
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(runs), 4), fontsize="small", frameon=False)
    return figure


def _counts(record: Mapping[str, Any]) -> bool:
    reason = record["finish_reason"]
    return record.get("measured", True) and reason is not None and FinishReason(reason).succeeded


def draw_placement(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Which request went where: a lane an instance, a bar a request from its first step there to its end there.

    Raises ValueError if no request was computed.
    """
    bars = [bar for record in records for bar in _bars(record)]
    if not bars:
        raise ValueError("no request was computed: expected at least one")
    lanes = sorted({instance for instance, *_ in bars})
    figure = Figure(figsize=(13, 1 + 0.9 * len(lanes)), layout="constrained")
    panel = figure.subplots()
    rows = _stacked(bars)
    depth = {lane: 1 + max(r for (i, *_), r in zip(bars, rows, strict=True) if i == lane) for lane in lanes}
    for (instance, start_s, end_s, share), row in zip(bars, rows, strict=True):
        height, colour = 0.8 / depth[instance], SHADES(0.25 + 0.7 * share)
        bottom = lanes.index(instance) - 0.4 + row * height
        panel.barh(bottom, end_s - start_s, height, start_s, align="edge", color=colour, linewidth=0)
    panel.set_yticks(range(len(lanes)), lanes)
    panel.invert_yaxis()
    panel.set_xlabel("seconds; darker: more of the prompt was cached")
    return figure


def _bars(record: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
    """(instance, start, end, cached share of the prompt) of a request where it was prefilled, and where decoded."""
    start_s, end_s = record["first_scheduled_s"], record["finished_s"]
    if start_s is None or end_s is None:
        return []
    share = (record["num_cached_local"] or 0) / max(record["num_prompt"], 1)
    if record["decode_scheduled_s"] is None:
        return [(record["instance"], start_s, end_s, share)]
    return [
        (record["instance"], start_s, record["prefill_end_s"], share),
        (record["decode_instance"], record["decode_scheduled_s"], end_s, share),
    ]


def _stacked(bars: Sequence[tuple[str, float, float, float]]) -> list[int]:
    """The row of each bar in its instance's lane: the first in which nothing else is at that time."""
    rows, ends_s = [0] * len(bars), dict[str, list[float]]()
    for number in sorted(range(len(bars)), key=lambda n: bars[n][1]):
        instance, start_s, end_s, _ = bars[number]
        free_from_s = ends_s.setdefault(instance, [])
        row = next((r for r, free_s in enumerate(free_from_s) if free_s <= start_s), len(free_from_s))
        free_from_s[row : row + 1] = [end_s]
        rows[number] = row
    return rows


def draw_occupancy(runs: Mapping[str, Sequence[Sample]]) -> Figure:
    """Stacked areas of blocks over time: a row an instance of a run, a column a tier that has blocks in any of them.

    runs: each run's samples under the name that is shown for it. Raises ValueError if there are none.
    """
    rows = [(name, own) for name, samples in runs.items() for own in _by_instance(samples)]
    if not rows:
        raise ValueError("no samples: expected at least one of a run")
    tiers = [tier for tier in TIERS if any(sum(getattr(s, tier).values()) for _, own in rows for s in own)]
    figure = Figure(figsize=(1.5 + 6.5 * len(tiers), 1 + 2.2 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(tiers), squeeze=False)
    for row, (name, own) in zip(panels, rows, strict=True):
        for panel, tier in zip(row, tiers, strict=True):
            _draw(panel, own, tier)
            panel.set_title(f"{name}: {own[0].instance}, {tier.upper()}", fontsize="small")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(KINDS), fontsize="small", frameon=False)
    return figure


def _by_instance(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples apart by instance, in the order in which the instances appear."""
    apart: dict[str, list[Sample]] = {}
    for sample in samples:
        apart.setdefault(sample.instance, []).append(sample)
    return list(apart.values())


def _draw(panel: Axes, samples: Sequence[Sample], tier: str) -> None:
    """One tier of one instance; a state lasts until the next sample."""
    times_s = [sample.time_s for sample in samples]
    counts = [[getattr(sample, tier)[kind] for sample in samples] for kind in KINDS]
    panel.stackplot(
        times_s,
        counts,
        labels=[LABELS[kind] for kind in KINDS],
        colors=[COLOURS[kind] for kind in KINDS],
        step="post",
        linewidth=0,
    )
    panel.margins(0)
    panel.set_xlabel("seconds")
    panel.set_ylabel("blocks")
