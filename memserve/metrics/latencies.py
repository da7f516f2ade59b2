"""Latencies: how the times of several requests are spread. Knows what each amounts to; computes no time itself."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from memserve.metrics.formulas import Phases, RequestMetrics

PERCENTILES = (50, 90, 95, 99)
STATISTICS = ("mean", *(f"p{q}" for q in PERCENTILES))


def distribution(values: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """Mean and percentiles (linear between neighbouring values) of float [n]; all null when n is 0."""
    if len(values) == 0:
        return dict.fromkeys(STATISTICS)
    figures = (np.mean(values), *np.percentile(values, PERCENTILES))
    return {name: float(figure) for name, figure in zip(STATISTICS, figures, strict=True)}


def _present(values: Iterable[float | None]) -> dict[str, float | None]:
    return distribution([value for value in values if value is not None])


def latencies(succeeded: Sequence[RequestMetrics]) -> dict[str, Any]:
    """Of requests that succeeded, each latency and each phase of them."""
    gaps = [request.itl for request in succeeded]
    return {
        "ttft_s": _present(request.ttft for request in succeeded),
        "second_token_s": _present(request.second_token for request in succeeded),
        "tpot_s": _present(request.tpot for request in succeeded),
        "itl_s": distribution(np.concatenate(gaps) if gaps else []),
        "max_itl_s": _present(request.max_itl for request in succeeded),
        "decode_itl_s": distribution(np.concatenate([gap[1:] for gap in gaps]) if gaps else []),
        "jct_s": _present(request.jct for request in succeeded),
        "phases_s": {
            phase.name: _present(getattr(request.phases, phase.name) for request in succeeded)
            for phase in fields(Phases)
        },
    }
