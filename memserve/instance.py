"""Instance: one inference engine of the cluster, sans-IO. Owns pool, local scheduler, runner and mode.

A driver owns time and moves messages; it calls, in this order and as often as it likes:

    receive(message)            any time; takes effect at the next `schedule`
    receive_from_peer(...)      a message of another pool; takes effect at once, or at the next `schedule`
    poll(now_ns)                lets time pass for transfers
    schedule(now_ns)            reads the inbox, picks the step's batch -> ScheduledBatch | None
    forward(batch)              computes it -> StepOutput
    commit(batch, output, ...)  enters results, checks ends, writes Tokens and Finished to the outbox
    drain_outbox()              what to send to the global scheduler; drain_peer_outbox() to other instances

so that the same instance runs in virtual time, in a torchrun rank, and inside `LLM`.
"""

from collections.abc import Collection, Generator

import numpy as np

from memserve.handoff import Handoffs
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.ticket import Arrival, Ticket, TicketState
from memserve.messages import CANCELLED, Abort, Dispatch, Finished, Message, PoolMessage, Redirect, Room, unpack_tokens
from memserve.model.tokenizer import Tokenizer
from memserve.request import FinishReason, Phase, Request, Role, Runner, ScheduledBatch, StepOutput
from memserve.sampling_params import SamplingParams
from memserve.sched.admission import Limits, RequestRefused
from memserve.sched.local_scheduler import LocalScheduler
from memserve.served import Served, ServedBook, adopted, check_stop, handoff_ended, new_request, stays, stop_strings
from memserve.words import HandedOver


class Instance:
    """`label` names it in the cluster. `eos_token_ids` end an answer unless it ignores them.

    `tokenizer` turns tokens into text for stop strings; None refuses requests that have any. `seed` feeds the random
    numbers of requests that bring no seed of their own. `handoffs`: of an instance that is one of several.
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
        handoffs: Handoffs | None = None,
    ) -> None:
        self.label, self.role = label, role
        self.scheduler, self.limits = scheduler, limits
        self._runner = runner
        self._eos_token_ids = frozenset(eos_token_ids)
        self._tokenizer, self._seed = tokenizer, seed
        self.handoffs, self._began_ns = handoffs, 0
        self._peer_inbox: list[tuple[int, PoolMessage]] = []
        self.served = ServedBook()
        self._inbox: list[Message] = []
        self._outbox: list[Message] = []

    @property
    def pool(self) -> BlockPool:
        return self.scheduler.pool

    @property
    def has_inbox(self) -> bool:
        return bool(self._inbox or self._peer_inbox)

    @property
    def num_unfinished(self) -> int:
        return len(self.served)

    @property
    def num_near_ties(self) -> int | None:
        return self._runner.num_near_ties

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do here: no request, no message, no transfer, no swap under way."""
        is_transferring = self.handoffs is not None and self.handoffs.transfers.num_open > 0
        return not (self.served or self.has_inbox or is_transferring or self.pool.num_swapping)

    def receive(self, message: Message) -> None:
        """Takes a Dispatch, an Abort or a Redirect; it is read at the next `schedule`."""
        self._inbox.append(message)

    def receive_from_peer(self, sender: int, message: PoolMessage, now_ns: int) -> None:
        """Takes a message of another instance's pool. What need not wait for the end of a step is read at once."""
        if self.serve(sender, message, now_ns):
            self.poll(now_ns)
        else:
            self._peer_inbox.append((sender, message))

    def serve(self, sender: int, message: PoolMessage, now_ns: int) -> bool:
        """Takes such a message if it need not wait for the end of a step, while one is computed; else False."""
        assert self.handoffs is not None, "an instance alone has no peers"
        return self.handoffs.receive_beside(sender, message, self.served, now_ns)

    def peer_gone(self, incarnation: int, now_ns: int) -> None:
        """Another instance's process is gone: what is under way between the two has failed."""
        if self.handoffs is not None:
            self.handoffs.peer_gone(incarnation, now_ns)
            self.poll(now_ns)

    def poll(self, now_ns: int) -> None:
        """Lets time pass: copies end, moves arrive, deadlines pass, tickets end."""
        self.pool.poll(now_ns)
        if self.handoffs is None:
            return
        for ticket in self.handoffs.poll(now_ns):
            if (request := self.handoffs.ended(ticket, now_ns)) is not None:
                self._handed_off(request, ticket, self.handoffs.migrations.forget(request.request_id))
        for request, ticket in self.handoffs.migrations.drain_declined():
            self._outbox.append(stays(request, self.label, ticket))

    def schedule(self, now_ns: int) -> ScheduledBatch | None:
        """Reads the inbox and picks the next batch; None when there is nothing to compute."""
        inbox, self._inbox = self._inbox, []
        for message in inbox:
            match message:
                case Dispatch():
                    self._accept(message, now_ns)
                case Abort():
                    self._abort(message, now_ns)
                case Redirect():
                    self._redirect(message, now_ns)
                case _:
                    raise TypeError(f"an instance takes no {type(message).__name__}")
        if self.handoffs is not None:
            self._migrate(self.handoffs, now_ns)
        self.pool.poll(now_ns)
        if self.handoffs is not None:
            self._read_peers(self.handoffs, now_ns)
            self._add_fetched(self.handoffs, now_ns)
        self._began_ns = now_ns
        batch = self.scheduler.schedule()
        if batch is not None:
            self.served.scheduled(batch, now_ns)
            if self.handoffs is not None:
                self.handoffs.scheduled(batch, self.served, now_ns)
        return batch

    def forward(self, batch: ScheduledBatch) -> StepOutput:
        """Computes the batch: writes its KV, samples its tokens."""
        return self._runner.forward(batch)

    def forward_by_layer(self, batch: ScheduledBatch) -> Generator[int, None, StepOutput]:
        """The same; after each layer that it yields, `handoffs.layers_written` may let that layer's KV go."""
        return self._runner.forward_by_layer(batch)

    def commit(self, batch: ScheduledBatch, output: StepOutput, times_ns: np.ndarray) -> None:
        """Enters the results. times_ns: int64 [num_steps], when each of the batch's steps ended."""
        sampled, ended_ns = batch.samples, int(times_ns[-1])
        self.scheduler.commit(batch, output)
        if self.handoffs is not None:
            self.handoffs.computed(batch, self._began_ns, ended_ns)
        for row, request in enumerate(batch.requests):
            if not sampled[row]:
                continue
            served = self.served[request.request_id]
            logprobs = output.logprobs[row] if output.logprobs else None
            self._outbox.append(served.generated(output.token_ids[row], times_ns, logprobs))
            if (reason := served.ended(output.token_ids[row], self._eos_token_ids)) is not None:
                self._finish(served, reason, "", ended_ns)
            elif served.decode is not None:
                self._hand_off(served, ended_ns)
        self.poll(ended_ns)

    def drain_outbox(self) -> list[Message]:
        """Messages for the global scheduler since the last call."""
        out, self._outbox = self._outbox, []
        return out

    def drain_peer_outbox(self) -> list[tuple[int, PoolMessage]]:
        """(incarnation, message) pairs for other instances since the last call."""
        return [] if self.handoffs is None else self.handoffs.drain_outbox()

    def drain_room(self) -> Room | None:
        """How much of the pool is free, if a request has come, gone or been preempted here since the last call."""
        has_changed = self.served.drain_changed(self.scheduler.counts.preemptions)
        return Room(self.pool.num_available, self.pool.num_blocks) if has_changed else None

    def check(self) -> None:
        """Raises unless every book of this instance agrees with the others."""
        handing_off = self.served.in_phase(Phase.HANDING_OFF)
        self.scheduler.check(handing_off)
        num_fetching = len(self.served.in_phase(Phase.FETCHING))
        num_known = self.scheduler.num_unfinished + len(handing_off) + num_fetching
        assert num_known == len(self.served), "requests were lost between instance and scheduler"
        if self.handoffs is not None:
            self.handoffs.transfers.check()

    def check_request(self, prompt: np.ndarray, params: SamplingParams) -> None:
        """Raises RequestRefused, a ValueError, for what this instance can never serve."""
        self.limits.check(prompt, params)
        check_stop(self._tokenizer, params.stop)

    def _accept(self, message: Dispatch, now_ns: int) -> None:
        prompt = unpack_tokens(message.tokens)
        try:
            self.check_request(prompt, message.params)
        except RequestRefused as refusal:
            self._outbox.append(Finished(message.request_id, message.attempt, FinishReason.REFUSED, str(refusal), None))
            return
        request = new_request(message, self._seed, self.limits.max_tokens(len(prompt), message.params))
        if self.handoffs is not None:
            self.handoffs.returns.next_turn(message.session_id)
        stops = stop_strings(self._tokenizer, request)
        self.served[message.request_id] = Served(request, now_ns, stops, decode=message.decode)
        if self.handoffs is not None and self.handoffs.fetches.takes(message.held_elsewhere):
            self.handoffs.fetches.offer(request, message.held_elsewhere)
        else:
            self.scheduler.add(request)

    def _abort(self, message: Abort, now_ns: int) -> None:
        served = self.served.get(message.request_id)
        if served is not None and served.request.attempt == message.attempt:
            self._finish(served, *CANCELLED, now_ns)
        elif self.handoffs is not None:  # it has ended meanwhile, or is on its way here
            self.handoffs.given_up.note(message.request_id, message.attempt)

    def _finish(self, served: Served, reason: FinishReason, detail: str, now_ns: int) -> None:
        request = served.request
        if request.phase is Phase.RUNNING:
            self.scheduler.stop(request)
        if self.handoffs is not None:
            self.handoffs.finished(request, served.prefill, reason, now_ns)
        self.scheduler.finish(request, reason)
        del self.served[request.request_id]
        self._outbox.append(Finished(request.request_id, request.attempt, reason, detail, served.stats(self.label)))

    def _hand_off(self, served: Served, now_ns: int) -> None:
        """The first token is there: the rest is the decode instance's."""
        assert self.handoffs is not None and served.decode is not None
        self.scheduler.stop(served.request)
        self.handoffs.prefilled(served.request, served.decode, served.stats(self.label), now_ns)

    def _handed_off(self, request: Request, ticket: Ticket, num_ahead: int) -> None:
        """A hand-off has ended: forgotten here, or kept until the global scheduler says what becomes of it."""
        self._outbox.append(handoff_ended(request, self.label, ticket, num_ahead))
        if ticket.state is TicketState.DONE:
            self.scheduler.finish(request, FinishReason.LENGTH)
            del self.served[request.request_id]

    def _redirect(self, message: Redirect, now_ns: int) -> None:
        """Another instance is named for a request: instead of one that has not taken it, or since this one leaves."""
        served = self.served.get(message.request_id)
        if served is None or served.request.attempt != message.attempt or self.handoffs is None:
            return
        if served.request.phase is not Phase.HANDING_OFF:
            self.handoffs.migrations.ask(served.request, message.decode)
        elif message.decode == self.handoffs.transfers.incarnation:  # nobody takes it, and its KV is here
            self.handoffs.drop(message.request_id, "it goes on here", now_ns)
            self.scheduler.resume(served.request)
        else:
            self.handoffs.redirect(message.request_id, message.decode, now_ns)

    def _migrate(self, handoffs: Handoffs, now_ns: int) -> None:
        """Requests that are to go on elsewhere, and decode, stop here; those that do not decode yet stay."""
        for request, target in handoffs.migrations.stopping(self.served.decoding, now_ns):
            served = self.served[request.request_id]
            self.scheduler.stop(request)
            handoffs.migrate(request, target, served.prefill, served.left(self.label), now_ns)

    def _read_peers(self, handoffs: Handoffs, now_ns: int) -> None:
        """Room is made, and what has arrived becomes requests here, between two steps alone."""
        inbox, self._peer_inbox = self._peer_inbox, []
        for sender, message in inbox:
            handoffs.receive(sender, message, self.served, now_ns)
        self.poll(now_ns)
        for arrival in handoffs.transfers.drain_arrivals():
            came = handoffs.take(arrival, self.served, self.label)
            if isinstance(came, HandedOver):
                self._adopt(came, arrival, now_ns)
            elif came is not None:
                self._outbox.append(came)

    def _add_fetched(self, handoffs: Handoffs, now_ns: int) -> None:
        """Decides for what others hold more of, and lets go on what need not wait for it any more."""
        handoffs.fetches.decide(self.scheduler.num_cached, now_ns)
        for request, record in handoffs.fetches.drain_ready():
            self.served[request.request_id].fetched(record, now_ns)
            self.scheduler.add(request)

    def _adopt(self, word: HandedOver, arrival: Arrival, now_ns: int) -> None:
        """A request that another instance had before goes on here."""
        assert self.handoffs is not None
        if (older := self.served.get(word.request_id)) is not None:
            self._finish(older, *CANCELLED, now_ns)  # its abort is on its way
        request = self.handoffs.take_over(word, arrival)
        self.served[word.request_id] = adopted(request, stop_strings(self._tokenizer, request), arrival, word)
        self.scheduler.adopt(request)
