"""Batching: how prompts and running answers share an instance's steps. Knows requests; allocates nothing.

mixed           a step takes a token of every answer, then chunks of prompts with what the budget leaves (Sarathi)
prefill_first   a step takes prompts alone as long as any can be admitted, and answers in steps of their own (vLLM
                until it had chunked prefill, the paper's 0.4.0 among them)
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from memserve.request import Request, ScheduledBatch
from memserve.values import wrong_return


class Batching(ABC):
    """Both lists in the order in which tokens are given out, which may end with the step's budget.

    Everybody is in one of the two, and once. Who was just admitted is asked for alone; where all whose turn it was were
    preempted, both are asked again of those that are left.
    """

    @abstractmethod
    def first(self, running: Sequence[Request]) -> list[Request]:
        """Those whose tokens are computed before prompts that wait are admitted, or when they just were."""

    @abstractmethod
    def otherwise(self, running: Sequence[Request]) -> list[Request]:
        """Those whose tokens are computed in a step that would have none."""

    def check(self, running: Sequence[Request], batch: ScheduledBatch) -> None:
        """Raises ValueError for a batch that has a request twice, one that does not run here, or nobody although
        somebody runs.
        """
        in_batch, name = set(map(id, batch.requests)), type(self).__name__  # in every step, of all that run: in C
        if not in_batch.issubset(map(id, running)):
            strange = next(r.request_id for r in batch.requests if all(r is not other for other in running))
            raise ValueError(f"{name} gives {strange!r}, which does not run here: expected those that it was asked of")
        if len(in_batch) < len(batch.requests):
            raise ValueError(f"{name} gives a request twice: expected each once at most")
        if running and not in_batch:
            raise ValueError(f"{name} leaves out {running[0].request_id!r}, and no other runs: expected it in a list")


def turn(batching: Batching, method: str, given: object) -> list[Request]:
    """What one of the two methods gave. Raises ValueError for no list of requests."""
    requests = list(given) if isinstance(given, Iterable) else None
    if requests is None or not set(map(type, requests)) <= {Request}:  # in every step, of all that run: in C
        raise wrong_return(batching, method, given, "a list of requests, of those that it was asked of")
    return requests


class Mixed(Batching):
    """Nobody waits for prompts: those that decode come before those that prefill, each in order of admission."""

    def first(self, running: Sequence[Request]) -> list[Request]:
        return sorted(running, key=lambda request: request.num_to_compute > 1)

    def otherwise(self, running: Sequence[Request]) -> list[Request]:
        return []


class PrefillFirst(Batching):
    """Answers wait for prompts, which makes first tokens soonest and tokens between them uneven."""

    def first(self, running: Sequence[Request]) -> list[Request]:
        return [request for request in running if request.num_computed < request.prefill_end]

    def otherwise(self, running: Sequence[Request]) -> list[Request]:
        return [request for request in running if request.num_computed >= request.prefill_end]
