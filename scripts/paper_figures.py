"""The paper's figures that a simulation can answer: what is run for each point of each curve, and what the paper has.

Numbers of the paper's text stand here, those of its drawings in paper_curves.py. Knows no command line; runs nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from paper_curves import CACHED_PERCENT, FIG8, RATES, TTFT_BY_POLICY


@dataclass(frozen=True)
class Shown:
    """A value that is taken of each report: the keys that lead to it, and its unit (see format_figure)."""

    label: str
    path: tuple[str, ...]
    unit: str = "seconds"


@dataclass(frozen=True)
class Curve:
    """A line of a figure. words: its options.  at: those of a point.  paper: by label, its values at points."""

    name: str
    words: Sequence[str]
    at: Callable[[float], Sequence[str]]
    paper: Mapping[str, Mapping[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """What the text says of a curve against another at a point: the change of what is shown as `label`, in per cent."""

    label: str
    curve: str
    base: str
    point: float
    percent: float


@dataclass(frozen=True)
class Figure:
    """name: its word, in configs/experiment/ too.  is_relative: values are shares of the curve's own at point 0."""

    name: str
    title: str
    axis: str
    points: Sequence[float]
    shown: Sequence[Shown]
    curves: Sequence[Curve]
    claims: Sequence[Claim] = ()
    is_relative: bool = False


# TPOT of the paper is of single gaps, decoding alone: its P99 on PD is what one prompt's step takes, then two (71 ms at
# 1 request/s on LooGLE, 133 at 3), and on 1P1D, 14 ms, no hand-off can be in it, nor in its means.
OF_REPORT = {"JCT": "jct_s", "TTFT": "ttft_s", "TPOT": "decode_itl_s"}
LATENCIES = [
    Shown(f"{statistic} {name}", (key, statistic.lower()))
    for name, key in OF_REPORT.items()
    for statistic in ("mean", "P99")
]
CLUSTERS = {
    "PD": ("cluster=colocated_1", 1),
    "1P1D": ("cluster=1p1d", 2),
    "1P2D": ("cluster=1p2d", 3),
    "2P1D": ("cluster=2p1d", 3),
}


def by_point(points: Sequence[float], values: Sequence[float]) -> dict[float, float]:
    return dict(zip(points, values, strict=True))


def systems(workload: str, num_turns: int, num_sessions: int) -> list[Curve]:
    """Fig. 8's, by its names: what ends in -CC caches contexts, as PD-Caching-3 where roles are apart.

    num_sessions: the same for all. The paper does not say how many; of ShareGPT its curves do. They end flat at the
    same JCT on one instance that decodes, whether one or two prefill for it and at whatever rate, as a set of some 60
    sessions gives, all under way at once; and PD's ends there too, so that PD is one instance.
    """
    drawn = FIG8[workload]
    return [
        _system(
            name, num_turns, num_sessions, {label: by_point(RATES, curves[name]) for label, curves in drawn.items()}
        )
        for name in drawn["mean JCT"]
    ]


def _system(name: str, num_turns: int, num_sessions: int, paper: Mapping[str, Mapping[float, float]]) -> Curve:
    cluster, num_instances = CLUSTERS[name.removesuffix("-CC")]
    if name.startswith("PD"):
        words = [] if name.endswith("-CC") else ["index=none", "policy=least_load"]
    else:
        words = ["mode=pd_caching_3" if name.endswith("-CC") else "mode=pd_basic"]

    def at(rate: float) -> list[str]:
        """Requests a second and instance."""
        sessions_a_second = rate * num_instances / num_turns
        return [f"workload.rate={sessions_a_second!r}", f"workload.num_sessions={num_sessions}"]

    return Curve(name, [cluster, *words], at, paper)


GRANULARITIES = {  # the paper's three ways to send a prompt's KV, and ours
    "by_layer": ["layout=discrete", "granularity=by_layer"],
    "by_request": ["layout=discrete", "granularity=by_request"],
    "by_request_agg": ["layout=aggregated", "granularity=by_request_agg"],
    "packed": ["layout=discrete", "granularity=packed"],
}
# The paper counts 2L calls a prompt by layer, which takes blocks that lie side by side, and 2L a block by request.
GRANULARITIES_BY_ITS_CALLS = {
    "by_layer_merged": [*GRANULARITIES["by_layer"], "granularity.merge=true"],
    **GRANULARITIES,
}


def granularities(
    words: Mapping[str, Sequence[str]],
    at: Callable[[float], Sequence[str]],
    paper: Mapping[str, Mapping[str, Mapping[float, float]]],
) -> list[Curve]:
    """A curve for each of `words`, by their names."""
    return [Curve(name, of_it, at, paper.get(name, {})) for name, of_it in words.items()]


def cached(name: str, percent: Sequence[float]) -> Curve:
    """A curve of Fig. 13, by a name of CACHED_PERCENT. In DRAM: what nobody uses has gone there by the next prompt."""
    length, _, how = name.removeprefix("p").partition("_")
    num_together = int(how.removeprefix("bs")) if how.startswith("bs") else 1
    words = {
        "": [],
        "dram": ["kvcache.hbm_bytes=null", "kvcache.num_hbm_blocks=600", "kvcache.num_dram_blocks=4000",
                 "kvcache.async_swap=true", "kvcache.swap_ahead_blocks=600"],
    }  # fmt: skip
    in_turn = ["workload/arrivals=closed_loop", f"workload.arrivals.concurrency={num_together}", "workload.rate=null"]
    paper = by_point(range(10, 101, 10), [p / 100 for p in percent])
    return Curve(name, words.get(how, in_turn), prompt_of(int(length), num_together), {"TTFT": paper})


def prompt_of(length: int, num_together: int = 1) -> Callable[[float], list[str]]:
    """Eleven prompts, or times so many, after each other; the first computes what the others share, a percentage."""

    def at(percent: float) -> list[str]:
        if not 0 <= percent <= 100:
            raise ValueError(f"{percent:g} per cent of a prompt: expected 0 to 100")
        shared, num_sessions = min(round(length * percent / 100), length - 1), 11 * num_together
        sharing = [f"workload.prefix_tokens={shared}", f"workload.share_ratio={num_sessions}"] if shared else []
        return [f"workload.num_sessions={num_sessions}", f"workload.prompt_tokens={length - shared}", *sharing]

    return at


_ALL = [
    Figure(
        "fig8_sharegpt", "Fig. 8, ShareGPT", "requests/s an instance", RATES, LATENCIES,
        systems("sharegpt", num_turns=3, num_sessions=60),
        [Claim("mean JCT", "1P2D", "PD", 5, -30), Claim("P99 JCT", "1P2D", "PD", 4, -42),
         Claim("mean JCT", "1P2D-CC", "1P2D", 5, -17), Claim("P99 JCT", "1P2D-CC", "1P2D", 5, -29),
         Claim("mean TTFT", "1P2D-CC", "1P2D", 5, -58), Claim("P99 TTFT", "1P2D-CC", "1P2D", 5, -45)],
    ),
    Figure(
        "fig8_loogle", "Fig. 8, LooGLE", "requests/s an instance", RATES, LATENCIES,
        systems("loogle", num_turns=5, num_sessions=180),
        [Claim("mean JCT", "2P1D", "PD", 5, -10.3), Claim("mean JCT", "1P1D-CC", "1P1D", 5, -26.9),
         Claim("P99 JCT", "1P1D-CC", "1P1D", 5, -22.5), Claim("mean TTFT", "1P1D-CC", "1P1D", 5, -56.2),
         Claim("P99 TTFT", "1P1D-CC", "1P1D", 4, -45.2)],
    ),
    Figure(
        "fig11", "Fig. 11a, one communicator: the KV of one prompt from P to D", "tokens", (256, 512, 1024, 2048),
        [Shown("transfer", ("phases_s", "transfer", "mean"))],
        granularities(GRANULARITIES, lambda tokens: [f"workload.prompt_tokens={tokens}"],
                      {"by_request": {"transfer": {2048: 0.102}},
                       "by_request_agg": {"transfer": {2048: 0.0193}}}),
    ),
    Figure(
        "fig12", "Fig. 12: granularities under load", "requests/s", (1, 5, 10, 15, 20, 25),
        [Shown("mean JCT", ("jct_s", "mean")), Shown("second token", ("second_token_s", "mean"))],
        granularities(GRANULARITIES_BY_ITS_CALLS, lambda rate: [f"workload.rate={rate}"], {}),
    ),
    Figure(
        "fig13", "Fig. 13: TTFT by what is cached, of the uncached", "per cent cached", range(0, 101, 10),
        [Shown("TTFT", ("ttft_s", "p50"), "share")],
        [cached(name, percent) for name, percent in CACHED_PERCENT.items()],
        is_relative=True,
    ),
    Figure(
        "fig15", "Fig. 15: policies on 3P1D", "share ratio", (2, 3),
        [Shown("P50 TTFT", ("ttft_s", "p50")), Shown("P99 TTFT", ("ttft_s", "p99")),
         Shown("hit ratio", ("hit_ratio",), "share")],
        [Curve(policy, [f"policy={policy}"], lambda ratio: [f"workload.share_ratio={ratio}"], paper)
         for policy, paper in TTFT_BY_POLICY.items()],
        [Claim("P99 TTFT", "prompt_tree", "session_affinity", 2, -8),
         Claim("P99 TTFT", "prompt_tree", "session_affinity", 3, -59)],
    ),
]  # fmt: skip
FIGURES = {figure.name: figure for figure in _ALL}
