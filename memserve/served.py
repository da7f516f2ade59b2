"""Served: what an instance keeps of a request beside the scheduler's books: event times, counts, stop strings."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np

from memserve.decisions import FetchRecord
from memserve.kvcache.ticket import Arrival, Ticket, TicketState
from memserve.messages import Dispatch, HandoffEnded, Tokens, pack_times, pack_tokens, unpack_tokens
from memserve.mixing import digest64
from memserve.model.detokenizer import Detokenizer, StopChecker
from memserve.model.tokenizer import Tokenizer
from memserve.request import FinishReason, Phase, Request, ScheduledBatch, TokenLogprobs
from memserve.request_stats import RequestStats, Stint
from memserve.sched.admission import RequestRefused
from memserve.words import HandedOver


class StopStrings:
    """Watches one answer's text for its stop strings, and its tokens for special ones, which the text leaves out."""

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, stop: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._checker = StopChecker(stop)
        special = tokenizer.special_tokens
        self._token_ids = {special[text] for text in stop if text in special}

    def ended_by(self, tokens: np.ndarray) -> bool:
        """Whether one of the strings is complete with these new tokens (int32 [n])."""
        for token in tokens.tolist():
            self._checker.push(self._detokenizer.push(token))
        return self._checker.stopped or not self._token_ids.isdisjoint(tokens.tolist())


@dataclass
class Served:
    """What the instance keeps about a request beside the scheduler's books. Times in ns; None before the event."""

    request: Request
    queued_ns: int
    stop_strings: StopStrings | None
    decode: int | None = None  # the instance that is to decode it
    prefill: int | None = None  # the instance that prefilled it
    first_scheduled_ns: int | None = None
    prefill_end_ns: int | None = None
    earlier: RequestStats | None = None  # what those counted that had it before
    num_brought: int = 0  # tokens that those had generated
    has_migrated: bool = False  # it was decoded before it came here
    handed_over_ns: Mapping[str, int] = field(default_factory=dict)  # its times, by their names in RequestStats
    fetch: FetchRecord | None = None  # what was decided about KV held elsewhere
    fetch_end_ns: int | None = None

    def fetched(self, record: FetchRecord | None, now_ns: int) -> None:
        """It waits no longer for KV that another instance holds."""
        self.fetch, self.fetch_end_ns = record, now_ns

    def scheduled(self, now_ns: int) -> None:
        """A step that it is part of begins."""
        if self.first_scheduled_ns is None:
            self.first_scheduled_ns = now_ns

    def generated(self, token_ids: np.ndarray, times_ns: np.ndarray, logprobs: TokenLogprobs | None) -> Tokens:
        """The message of the request's last len(token_ids) tokens (int32 [n]), generated at times_ns (int64 [n])."""
        r = self.request
        if self.prefill_end_ns is None:
            self.prefill_end_ns = int(times_ns[0])
        return Tokens(
            r.request_id, r.attempt, r.num_generated - len(token_ids), pack_tokens(token_ids), pack_times(times_ns),
            None if logprobs is None else [logprobs],
        )  # fmt: skip

    def ended(self, new_tokens: np.ndarray, eos_token_ids: Collection[int]) -> FinishReason | None:
        """Why the answer is complete with these tokens, or None."""
        request, last = self.request, int(new_tokens[-1])
        if last in request.params.stop_token_ids or (not request.params.ignore_eos and last in eos_token_ids):
            return FinishReason.STOP
        if self.stop_strings is not None and self.stop_strings.ended_by(new_tokens):
            return FinishReason.STOP
        return FinishReason.LENGTH if request.num_tokens >= request.max_num_tokens else None

    @property
    def num_fetched(self) -> int:
        """Tokens that were fetched for the request and still there when it was admitted."""
        return (
            0
            if self.fetch is None
            else min(self.fetch.num_fetched, max(self.request.num_cached - self.fetch.num_cached, 0))
        )

    @property
    def decodes(self) -> bool:
        """Whether it has its next token to compute, and that alone, and runs here, or came with its KV and is to: of
        one that was preempted that may be elsewhere.
        """
        request = self.request
        has_kv = request.phase is Phase.RUNNING or (request.phase is Phase.WAITING and not request.num_preemptions)
        return has_kv and request.num_to_compute == 1 and request.num_generated > 0

    def stint(self, label: str) -> Stint:
        """What this instance, of that name, has done of the answer so far."""
        r = self.request
        return Stint(label, r.num_generated - self.num_brought, r.num_prefilled, r.num_preemptions)

    def stats(self, label: str) -> RequestStats:
        """The request's counts; of one that came from another instance, those of all that had it together."""
        request = self.request
        if self.earlier is not None:
            return self._continued(self.earlier, label)
        return RequestStats(
            instance=label,
            queued_ns=self.queued_ns,
            first_scheduled_ns=self.first_scheduled_ns,
            prefill_end_ns=self.prefill_end_ns,
            num_prompt=request.num_prompt,
            num_cached_local=request.num_cached - self.num_fetched,
            num_fetched=self.num_fetched,
            fetch=self.fetch,
            fetch_end_ns=self.fetch_end_ns,
            num_computed=request.num_prefilled,
            num_generated=request.num_generated,
            num_preemptions=request.num_preemptions,
        )

    def _continued(self, earlier: RequestStats, label: str) -> RequestStats:
        """The counts of before, and this instance's. Of times there is one hand-off, after the prefill."""
        request, scheduled_ns = self.request, self.first_scheduled_ns
        stats = msgspec.structs.replace(
            earlier,
            num_generated=request.num_generated,
            num_preemptions=earlier.num_preemptions + request.num_preemptions,
            num_computed_on_decode=earlier.num_computed_on_decode + request.num_prefilled,
            decode_instance=label,
            num_preemptions_on_decode=earlier.num_preemptions_on_decode + request.num_preemptions,
        )
        if not self.has_migrated:
            return msgspec.structs.replace(stats, decode_scheduled_ns=scheduled_ns, **self.handed_over_ns)
        if earlier.received_ns is not None and earlier.decode_scheduled_ns is None:
            return msgspec.structs.replace(stats, decode_scheduled_ns=scheduled_ns)
        return stats

    def left(self, label: str) -> RequestStats:
        """Its counts when it leaves this instance, in the middle of its answer."""
        stats = self.stats(label)
        return msgspec.structs.replace(stats, stints=(*stats.stints, self.stint(label)))


class ServedBook(dict[str, Served]):
    """The requests of an instance by their ids."""

    def __init__(self) -> None:
        super().__init__()
        self._has_changed, self._num_preemptions = False, 0

    def __setitem__(self, request_id: str, served: Served) -> None:
        super().__setitem__(request_id, served)
        self._has_changed = True

    def __delitem__(self, request_id: str) -> None:
        super().__delitem__(request_id)
        self._has_changed = True

    def scheduled(self, batch: ScheduledBatch, now_ns: int) -> None:
        """A step begins."""
        for request in batch.requests:
            self[request.request_id].scheduled(now_ns)

    def drain_changed(self, num_preemptions: int) -> bool:
        """Whether one has come, gone or been preempted since the last call. num_preemptions: so far."""
        changed = self._has_changed or num_preemptions != self._num_preemptions
        self._has_changed, self._num_preemptions = False, num_preemptions
        return changed

    def decoding(self, request_ids: Iterable[str]) -> list[Request]:
        """Of those that have these ids, the ones that decode here."""
        return [self[request_id].request for request_id in request_ids if self[request_id].decodes]

    def leaving(self, batch: ScheduledBatch) -> list[tuple[Request, int]]:
        """Of a batch, the requests that another instance is to decode, and that one; an answer of one token is not."""
        decoders = ((r, self[r.request_id].decode) for r in batch.requests if r.max_num_tokens > r.num_prompt + 1)
        return [(request, decode) for request, decode in decoders if decode is not None]

    def in_phase(self, phase: Phase) -> list[Request]:
        """Those in this phase."""
        return [served.request for served in self.values() if served.request.phase is phase]


def adopted(request: Request, stops: StopStrings | None, arrival: Arrival, word: HandedOver) -> Served:
    """A request that another instance had before, which says so in `word`."""
    if stops is not None:
        stops.ended_by(request.output_token_ids)
    times_ns = {
        "ask_read_ns": arrival.read_ns,
        "granted_ns": arrival.granted_ns,
        "arrived_ns": arrival.arrived_ns,
        "received_ns": arrival.received_ns,
    }
    return Served(
        request, arrival.received_ns, stops, prefill=word.prefill, prefill_end_ns=arrival.received_ns,
        earlier=word.stats, num_brought=request.num_generated, has_migrated=word.migrates,
        handed_over_ns=times_ns,
    )  # fmt: skip


def handoff_ended(request: Request, label: str, ticket: Ticket, num_ahead: int) -> HandoffEnded:
    """What the global scheduler is told of a hand-off by the instance that had the request, `label`.

    num_ahead: tokens whose KV went ahead of it.
    """
    done = ticket.state is TicketState.DONE
    refused = not done and request.phase is Phase.HANDING_OFF and ticket.refused
    return HandoffEnded(
        request.request_id, request.attempt, label, done, refused, ticket.reason, request.num_computed, num_ahead
    )


def stays(request: Request, label: str, ticket: Ticket) -> HandoffEnded:
    """As `handoff_ended`, of a request that went on meanwhile: what was to go ahead of it, under `ticket`, did not."""
    return HandoffEnded(request.request_id, request.attempt, label, False, ticket.refused, ticket.reason)


def new_request(message: Dispatch, engine_seed: int, max_tokens: int) -> Request:
    """The request that a Dispatch asks for, whose answer may have max_tokens tokens."""
    prompt = unpack_tokens(message.tokens)
    return Request(
        message.request_id,
        prompt,
        message.params,
        attempt=message.attempt,
        session_id=message.session_id,
        arrival_ns=message.arrival_ns,
        priority=message.priority,
        seed=drawn_seed(engine_seed, message.request_id),
        max_num_tokens=len(prompt) + max_tokens,
    )


def check_stop(tokenizer: Tokenizer | None, stop: tuple[str, ...]) -> None:
    """Raises RequestRefused for stop strings that no answer can ever have in it."""
    if stop and tokenizer is None:
        raise RequestRefused(f"stop={stop!r}: stop strings need a tokenizer, and this model has none")
    special = tokenizer.special_tokens if tokenizer is not None else {}
    for text in stop:
        within = next((token for token in special if token in text and token != text), None)
        if within is not None and text not in special:
            raise RequestRefused(
                f"stop={text!r} has the special token {within!r} in it, which text leaves out: expected that token "
                f"alone, or stop_token_ids=[{special[within]}]"
            )


def stop_strings(tokenizer: Tokenizer | None, request: Request) -> StopStrings | None:
    """The watcher of an answer that has stop strings."""
    stop = request.params.stop
    return StopStrings(tokenizer, request.prompt, stop) if tokenizer is not None and stop else None


def drawn_seed(engine_seed: int, request_id: str) -> int:
    """The seed of a request that brings none: of the engine's seed and the request's id; 63 bits, equal everywhere."""
    return digest64(f"{engine_seed}/{request_id}".encode()) >> 1
