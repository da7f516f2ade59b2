"""Instance: one inference engine of the cluster, sans-IO. Owns pool, local scheduler, runner and mode.

A driver owns time and moves messages; it calls, in this order and as often as it likes:

    receive(message)            any time; takes effect at the next `schedule`
    schedule(now_ns)            reads the inbox, picks the step's batch -> ScheduledBatch | None
    forward(batch)              computes it -> StepOutput
    commit(batch, output, ...)  enters results, checks ends, writes Tokens and Finished to the outbox
    drain_outbox()              what to send

so that the same instance runs in virtual time, in a torchrun rank, and inside `LLM`.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from memserve.kvcache.block_pool import BlockPool
from memserve.messages import (
    Abort,
    Dispatch,
    Finished,
    Message,
    RequestStats,
    Tokens,
    pack_times,
    pack_tokens,
    unpack_tokens,
)
from memserve.model.detokenizer import Detokenizer, StopChecker
from memserve.model.tokenizer import Tokenizer
from memserve.request import FinishReason, Request, Role, SamplingParams, ScheduledBatch, StepOutput
from memserve.sched.admission import Limits, RequestRefused
from memserve.sched.local_scheduler import LocalScheduler


class Runner(Protocol):
    """Computes batches. It neither moves a request's borders nor appends tokens: `LocalScheduler.commit` does."""

    def forward(self, batch: ScheduledBatch) -> StepOutput: ...


class _StopStrings:
    """Watches one answer's text for its stop strings."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._checker = StopChecker(stop)

    def ended_by(self, tokens: np.ndarray) -> bool:
        """Whether one of the strings is complete with these new tokens (int32 [n])."""
        for token in tokens.tolist():
            self._checker.push(self._detokenizer.push(token))
        return self._checker.stopped


@dataclass
class _Served:
    """What the instance keeps about a request beside the scheduler's books. Times in ns; None before the event."""

    request: Request
    queued_ns: int
    stop_strings: _StopStrings | None
    first_scheduled_ns: int | None = None
    prefill_end_ns: int | None = None


class Instance:
    """`label` names it in the cluster. `eos_token_ids` end an answer unless it ignores them.

    `tokenizer` turns tokens into text for stop strings; None refuses requests that have any. `seed` feeds the random
    numbers of requests that bring no seed of their own.
    """

    def __init__(
        self,
        label: str,
        role: Role,
        scheduler: LocalScheduler,
        runner: Runner,
        limits: Limits,
        *,
        eos_token_ids: Collection[int] = (),
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
    ) -> None:
        self.label = label
        self.role = role
        self.scheduler = scheduler
        self.limits = limits
        self._runner = runner
        self._eos_token_ids = frozenset(eos_token_ids)
        self._tokenizer = tokenizer
        self._seed = seed
        self._served: dict[str, _Served] = {}
        self._inbox: list[Message] = []
        self._outbox: list[Message] = []

    @property
    def pool(self) -> BlockPool:
        return self.scheduler.pool

    @property
    def has_inbox(self) -> bool:
        return bool(self._inbox)

    @property
    def num_unfinished(self) -> int:
        return len(self._served)

    def receive(self, message: Message) -> None:
        """Takes a Dispatch or an Abort; it is read at the next `schedule`."""
        self._inbox.append(message)

    def schedule(self, now_ns: int) -> ScheduledBatch | None:
        """Reads the inbox and picks the next batch; None when there is nothing to compute."""
        inbox, self._inbox = self._inbox, []
        for message in inbox:
            match message:
                case Dispatch():
                    self._accept(message, now_ns)
                case Abort():
                    self._abort(message, now_ns)
                case _:
                    raise TypeError(f"an instance takes no {type(message).__name__}")
        batch = self.scheduler.schedule()
        if batch is not None:
            for request in batch.requests:
                served = self._served[request.request_id]
                served.first_scheduled_ns = now_ns if served.first_scheduled_ns is None else served.first_scheduled_ns
        return batch

    def forward(self, batch: ScheduledBatch) -> StepOutput:
        """Computes the batch: writes its KV, samples its tokens."""
        return self._runner.forward(batch)

    def commit(self, batch: ScheduledBatch, output: StepOutput, times_ns: np.ndarray) -> None:
        """Enters the results. times_ns: int64 [num_steps], when each of the batch's steps ended."""
        sampled = batch.samples
        self.scheduler.commit(batch, output)
        for row, request in enumerate(batch.requests):
            if not sampled[row]:
                continue
            served = self._served[request.request_id]
            if served.prefill_end_ns is None:
                served.prefill_end_ns = int(times_ns[0])
            logprobs = output.logprobs[row] if output.logprobs else None
            self._outbox.append(
                Tokens(
                    request.request_id,
                    request.attempt,
                    request.num_generated - batch.num_steps,
                    pack_tokens(output.token_ids[row]),
                    pack_times(times_ns),
                    None if logprobs is None else [logprobs],
                )
            )
            reason = self._ended(served, output.token_ids[row])
            if reason is not None:
                self._finish(served, reason, "")

    def drain_outbox(self) -> list[Message]:
        """Messages for the global scheduler since the last call."""
        out, self._outbox = self._outbox, []
        return out

    def check(self) -> None:
        """Raises unless every book of this instance agrees with the others."""
        self.scheduler.check()
        assert self.scheduler.num_unfinished == len(self._served), "requests were lost between instance and scheduler"

    def check_request(self, prompt: np.ndarray, params: SamplingParams) -> None:
        """Raises RequestRefused, a ValueError, for what this instance can never serve."""
        self.limits.check(prompt, params)
        if params.stop and self._tokenizer is None:
            raise RequestRefused(f"stop={params.stop!r}: stop strings need a tokenizer, and this model has none")

    def _accept(self, message: Dispatch, now_ns: int) -> None:
        prompt = unpack_tokens(message.tokens)
        try:
            self.check_request(prompt, message.params)
        except RequestRefused as refusal:
            self._outbox.append(Finished(message.request_id, message.attempt, FinishReason.REFUSED, str(refusal), None))
            return
        request = Request(
            message.request_id,
            prompt,
            message.params,
            attempt=message.attempt,
            session_id=message.session_id,
            arrival_ns=message.arrival_ns,
            seed=drawn_seed(self._seed, message.request_id),
            max_num_tokens=len(prompt) + self.limits.max_tokens(len(prompt), message.params),
        )
        stop = message.params.stop
        stops = _StopStrings(self._tokenizer, stop) if self._tokenizer is not None and stop else None
        self._served[message.request_id] = _Served(request, now_ns, stops)
        self.scheduler.add(request)

    def _abort(self, message: Abort, now_ns: int) -> None:
        served = self._served.get(message.request_id)
        if served is not None and served.request.attempt == message.attempt:  # else it has ended meanwhile
            self._finish(served, FinishReason.ABORTED, "cancelled by the client")

    def _ended(self, served: _Served, new_tokens: np.ndarray) -> FinishReason | None:
        """Why the answer is complete with these tokens, or None."""
        request, last = served.request, int(new_tokens[-1])
        if last in request.params.stop_token_ids or (not request.params.ignore_eos and last in self._eos_token_ids):
            return FinishReason.STOP
        if served.stop_strings is not None and served.stop_strings.ended_by(new_tokens):
            return FinishReason.STOP
        return FinishReason.LENGTH if request.num_tokens >= request.max_num_tokens else None

    def _finish(self, served: _Served, reason: FinishReason, detail: str) -> None:
        request = served.request
        self.scheduler.finish(request, reason)
        del self._served[request.request_id]
        stats = RequestStats(
            instance=self.label,
            queued_ns=served.queued_ns,
            first_scheduled_ns=served.first_scheduled_ns,
            prefill_end_ns=served.prefill_end_ns,
            num_prompt=request.num_prompt,
            num_cached_local=request.num_cached,
            num_computed=request.num_prefilled,
            num_generated=request.num_generated,
            num_preemptions=request.num_preemptions,
        )
        self._outbox.append(Finished(request.request_id, request.attempt, reason, detail, stats))


def drawn_seed(engine_seed: int, request_id: str) -> int:
    """The seed of a request that brings none: of the engine's seed and the request's id; 63 bits, equal everywhere."""
    digest = hashlib.blake2b(f"{engine_seed}/{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
