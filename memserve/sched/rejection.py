"""Rejection: whether a request is refused at once, since its answer would come too late for anybody to want it.

What is refused costs nothing, and nothing waits behind it: under more load than there is room for, somebody's answer
is in time (Mooncake's early rejection). It is asked when the instances of a request's first attempt are named; what was
sent out once is not refused any more. A rule of one's own is one class, named by `rejection._target_=my_package.Mine`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from memserve.sched.cost_model.base import CostModel
from memserve.sched.routing import RouteRequest
from memserve.values import require_duration, require_number

_NOW = np.zeros(1, dtype=np.int64)
_NO_OBJECTIVES: Mapping[str, Mapping[str, float | None]] = {}


@dataclass(frozen=True)
class Prospect:
    """What awaits a request on the instances that are named for it. Seconds are as they are predicted.

    now_ns: on the cluster's clock.  waited_s: since it arrived.  queued_s: of the prefills that wait there.  prefill_s:
    of its own, behind what is cached.  num_decoding: other unfinished requests of the instance that will decode it.
    num_decoding_tokens: their prompts.
    """

    request: RouteRequest
    now_ns: int
    waited_s: float
    queued_s: float
    prefill_s: float
    num_decoding: int
    num_decoding_tokens: int


class Rejection(ABC):
    """Refuses requests, or none."""

    @abstractmethod
    def reason(self, prospect: Prospect) -> str | None:
        """Why the request is refused, in words for the client; None: it is served."""


def refusal(rejection: Rejection, prospect: Prospect) -> str | None:
    """Its `reason`. Raises ValueError where that is neither words nor None."""
    reason: object = rejection.reason(prospect)
    if reason is not None and (not isinstance(reason, str) or not reason):
        raise ValueError(f"{type(rejection).__name__}.reason gave {reason!r}: expected words, or None")
    return reason


class NoRejection(Rejection):
    """Every request is served, however late. The baseline."""

    def reason(self, prospect: Prospect) -> str | None:
        return None


class EarlyRejection(Rejection):
    """Refuses what is predicted to miss its objective for the first token, or for the mean of those that follow.

    How far apart two tokens will be at most, and how long an answer, nobody predicts: slo.itl_s and slo.jct_s refuse
    no request. A request of a class with objectives of its own is held to those; one for which there is neither is
    never refused.

    ttft_s: the first token comes after what the request has waited, the prefills that wait on its instance and its own
    (Eq. 1); None: any will do.  tpot_s: a token takes a step of all unfinished requests of the instance that decodes
    it, prompts alone and nothing prefilled beside; None: any will do.  slo_scale: all are multiplied by it.
    objectives: of each class, by its name, those that it has instead of these two, by theirs.
    Raises ValueError where nobody has an objective, or where one is out of range.
    """

    def __init__(
        self,
        cost_model: CostModel,
        ttft_s: float | None = None,
        tpot_s: float | None = None,
        slo_scale: float = 1.0,
        objectives: Mapping[str, Mapping[str, float | None]] = _NO_OBJECTIVES,
    ) -> None:
        if not isinstance(cost_model, CostModel):
            raise ValueError(f"rejection.cost_model={type(cost_model).__name__}: expected a CostModel")
        if not isinstance(objectives, Mapping):
            raise ValueError(f"rejection.objectives={objectives!r}: expected those of each class, by its name")
        self._for_all = {"ttft_s": ttft_s, "tpot_s": tpot_s}
        self._of_class = {name: {**self._for_all, **own} for name, own in objectives.items()}
        bounds = (each[name] for each in (self._of_class.values() or [self._for_all]) for name in self._for_all)
        if all(bound_s is None for bound_s in bounds):
            raise ValueError("rejection.ttft_s=None and rejection.tpot_s=None: expected slo.ttft_s= or slo.tpot_s=, or "
                             "a class with one of them")  # fmt: skip
        for name, bound_s in (("rejection.ttft_s", ttft_s), ("rejection.tpot_s", tpot_s)):
            if bound_s is not None:
                require_duration(name, bound_s)
        require_number("rejection.slo_scale", slo_scale, "a finite number > 0", minimum=0.0, exclusive=True)
        self._cost_model, self._slo_scale = cost_model, slo_scale

    def reason(self, prospect: Prospect) -> str | None:
        of_class = prospect.request.class_name
        bounds = self._of_class.get(of_class, self._for_all)
        ttft_s, tpot_s = bounds["ttft_s"], bounds["tpot_s"]
        first_s = prospect.waited_s + prospect.queued_s + prospect.prefill_s
        if ttft_s is not None and first_s > ttft_s * self._slo_scale:
            return f"its first token is predicted after {first_s:.3g} s: {self._expected('ttft_s', ttft_s, of_class)}"
        if tpot_s is None:
            return None
        step_s = self._step_s(prospect)
        if step_s <= tpot_s * self._slo_scale:
            return None
        return f"a token is predicted to take {step_s:.3g} s: {self._expected('tpot_s', tpot_s, of_class)}"

    def _step_s(self, prospect: Prospect) -> float:
        """Seconds of a step that decodes the request among the others, whose prompts are taken to be alike."""
        num_cached = np.full(prospect.num_decoding + 1, len(prospect.request.tokens), dtype=np.int64)
        num_cached[1:] = prospect.num_decoding_tokens // max(prospect.num_decoding, 1)
        return float(self._cost_model.steps_s(num_cached, np.ones_like(num_cached), _NOW)[0])

    def _expected(self, name: str, bound_s: float, of_class: str) -> str:
        scale = "" if self._slo_scale == 1 else f"{self._slo_scale:g} times "
        if bound_s != self._for_all[name]:
            return f"expected within {scale}{name}={bound_s:g} of class {of_class}"
        return f"expected within {scale}slo.{name}={bound_s:g}"
