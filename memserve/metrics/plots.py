"""Plots: figures made of what a run left behind. Knows no file: samples in, a Figure out, without a display."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memserve.metrics.occupancy import KINDS, TIERS, Sample

COLOURS = {
    "request": "#1f4e9c",
    "both": "#5b9bd5",
    "index": "#f2b134",
    "transfer": "#7b3fa0",
    "quarantine": "#c0392b",
    "free": "#eeeeee",
}
LABELS = {
    "request": "requests alone",
    "both": "requests, and cached",
    "index": "cached alone",
    "transfer": "transfers",
    "quarantine": "quarantine",
    "free": "free",
}


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
