"""Timeline: when what happened to one request. The only primitive that metrics are computed from (metrics/formulas.py).

    arrival -> dispatched -> queued -> first_scheduled -> prefill_end = first token leaves -> tokens ... -> finished
    client     scheduler     instance  instance           instance                                          client

All times are integer nanoseconds on the cluster's clock. Token times are kept as arrays, one entry a token.
"""

from dataclasses import dataclass, field

import numpy as np

from memserve.decisions import Migration, RouteChoice
from memserve.request import FinishReason, TokenLogprobs
from memserve.request_stats import RequestStats


@dataclass
class RequestTimeline:
    """One request from the client's side. Built by the global scheduler's reader of messages, read by metrics."""

    request_id: str
    session_id: str
    arrival_ns: int
    num_prompt: int
    priority: int = 0
    class_name: str = ""
    dispatched_ns: int | None = None
    finished_ns: int | None = None
    attempt: int = 0
    instance: str = ""
    reason: FinishReason | None = None
    detail: str = ""
    stats: RequestStats | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_output: int = 0
    num_promised: int = 0  # prompt tokens that its instance was believed to have when it was dispatched
    routes: list[RouteChoice] = field(default_factory=list)  # of all attempts; where KV is handed over, also to whom
    migrations: list[Migration] = field(default_factory=list)
    _token_ids: list[np.ndarray] = field(default_factory=list)
    _token_times_ns: list[np.ndarray] = field(default_factory=list)

    def add_tokens(self, token_ids: np.ndarray, times_ns: np.ndarray) -> None:
        """Appends int32 [n] ids and int64 [n] times."""
        self._token_ids.append(token_ids)
        self._token_times_ns.append(times_ns)
        self.num_output += len(token_ids)

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [num_output]."""
        return _joined(self._token_ids, np.int32)

    @property
    def token_times_ns(self) -> np.ndarray:
        """int64 [num_output]."""
        return _joined(self._token_times_ns, np.int64)

    @property
    def succeeded(self) -> bool:
        return self.reason is not None and self.reason.succeeded


def _joined(chunks: list[np.ndarray], dtype: type) -> np.ndarray:
    """Of all chunks one, which takes their place: there may be hundreds, and figures ask several times."""
    if len(chunks) != 1:
        chunks[:] = [np.concatenate(chunks) if chunks else np.empty(0, dtype=dtype)]
    return chunks[0]
