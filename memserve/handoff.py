"""Handoffs: how one instance performs its mode's transfers, request by request. Sans-IO; decides nothing.

    prefill instance   begun (by_layer) or prefilled -> ticket -> DONE: the request is decode's
                                                               -> FAILED: kept until it is redirected or aborted
    decode instance    arrival -> a Request with its blocks -> local scheduler -> finished -> given back (PD-Caching-3)
    who leaves         a request that decodes here -> ticket -> DONE: it is another's
                                                             -> FAILED, or no room there now: as above, or it stays

What travels as `private` beside the KV is one of words.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from memserve.bequest import Bequeathed, Bequest
from memserve.clock import earliest
from memserve.deposits import Deposited, Deposits
from memserve.fetches import FetchedKV, Fetches
from memserve.given_up import GivenUp
from memserve.kvcache.sending import DECLINED
from memserve.kvcache.ticket import Arrival, Ticket, TicketState, TransferOptions
from memserve.kvcache.transfers import Transfers
from memserve.layer_marks import LayerMarks
from memserve.messages import (
    CANCELLED,
    Ask,
    Fetch,
    Finished,
    Inherited,
    Message,
    PoolMessage,
    Refuse,
    Wait,
    pack_tokens,
)
from memserve.migrations import Migrations, SentAhead
from memserve.request import FinishReason, Request, ScheduledBatch
from memserve.request_stats import RequestStats
from memserve.returns import Returns
from memserve.sched.modes import Mode
from memserve.served import Served, ServedBook
from memserve.words import GivenBack, HandedOver, packed, read_word, request_of


@dataclass
class _Handoff:
    """One request on its way: its ticket, when it was asked for, the instance that prefilled it, whether it was decoded
    here before, how often it had been preempted, and what the receiver is told of it; None before it has a token.
    """

    request: Request
    ticket: Ticket
    asked_ns: int
    prefill: int | None
    migrates: bool
    num_preemptions: int
    stats: RequestStats | None = None


class Handoffs:
    """The transfers of one instance's requests. mode: says what is sent where, and what is indexed."""

    def __init__(
        self, transfers: Transfers, mode: Mode, fetches: Fetches, bequest: Bequest, deposits: Deposits,
        migrations: Migrations,
    ) -> None:  # fmt: skip
        self.transfers, self.fetches, self.bequest, self.deposits = transfers, fetches, bequest, deposits
        self.migrations = migrations
        self.given_up = GivenUp()
        self.returns = Returns(transfers)
        self.peak_waiting = 0  # most requests that waited for a grant at a time
        self._mode, self._marks = mode, LayerMarks(transfers)
        self._on_the_way: dict[str, _Handoff] = {}
        self._request_ids: dict[tuple[int, int], str] = {}  # by tickets, of those that have not ended

    @property
    def asks_at_first_chunk(self) -> bool:
        return self._mode.hand_off is not None and self.transfers.granularity.asks_at_first_chunk

    @property
    def requests(self) -> list[Request]:
        return [handoff.request for handoff in self._on_the_way.values()]

    def scheduled(self, batch: ScheduledBatch, here: ServedBook, now_ns: int) -> None:
        """A step is about to be computed. Not of each that decodes, of which many are settled as one."""
        for request, decode in here.leaving(batch) if self.asks_at_first_chunk else ():
            self._begin(request, decode, now_ns)
        if max(batch.num_new) > 1:
            self.deposits.look_ahead(now_ns)

    def layers_written(self, batch: ScheduledBatch, layers_ns: Mapping[int, int]) -> None:
        """A step is under way and writes these layers, each at its time: then it may leave, while the next ones are
        computed.
        """
        for request, num_new in zip(batch.requests, batch.num_new, strict=True):
            if request.request_id in self._on_the_way and self.asks_at_first_chunk:
                ticket = self._on_the_way[request.request_id].ticket
                self._marks.written(ticket, request, request.num_computed + num_new, layers_ns)

    def computed(self, batch: ScheduledBatch, began_ns: int, ended_ns: int) -> None:
        """A step was computed. Layers that `layers_written` was not told of count as written evenly over it."""
        if self.asks_at_first_chunk:
            here = [r for r in batch.requests if r.request_id in self._on_the_way]
            self._marks.computed([(self._on_the_way[r.request_id].ticket, r) for r in here], began_ns, ended_ns)

    def prefilled(self, request: Request, decode: int, stats: RequestStats, now_ns: int) -> None:
        """The prompt is computed and the first token there: what is not on its way yet is asked for now."""
        if request.request_id not in self._on_the_way:
            self._start(request, decode, now_ns, prefill=self.transfers.incarnation)
        self._tell(request, stats)

    def migrate(self, request: Request, target: int, prefill: int | None, stats: RequestStats, now_ns: int) -> None:
        """A request that was decoded here, and is stopped, goes on at another instance of the role.

        prefill: the instance that prefilled it, if it may get KV back.
        """
        self._start(request, target, now_ns, prefill=self._still_there(prefill), migrates=True)
        self._tell(request, stats)

    def redirect(self, request_id: str, target: int, now_ns: int) -> None:
        """Hands a request whose ticket has failed to another instance."""
        handoff = self._on_the_way.pop(request_id)
        assert handoff.stats is not None, "it has a token"
        prefill = self._still_there(handoff.prefill)
        self._start(handoff.request, target, now_ns, prefill=prefill, migrates=handoff.migrates)
        self._tell(handoff.request, handoff.stats)

    def drop(self, request_id: str, reason: str, now_ns: int) -> None:
        """Forgets a request's hand-off; an open ticket fails."""
        handoff = self._on_the_way.pop(request_id, None)
        if handoff is not None:
            self.transfers.cancel(handoff.ticket, reason, now_ns)

    def ended(self, ticket: Ticket, now_ns: int) -> Request | None:
        """The request whose hand-off this ticket was, if it still waits for it. A DONE one is forgotten here."""
        handoff = self._of_ticket(ticket.ticket_id)
        self._request_ids.pop(ticket.ticket_id, None)
        if handoff is None:
            return None
        if ticket.state is TicketState.DONE:
            del self._on_the_way[handoff.request.request_id]
            self._deposit(handoff.request, now_ns)
        return handoff.request

    def finished(self, request: Request, prefill: int | None, reason: FinishReason, now_ns: int) -> None:
        """A request has ended here. prefill: the instance that prefilled it, if it was another."""
        self.drop(request.request_id, f"the request ended: {reason}", now_ns)
        self.fetches.drop(request)
        self.migrations.forget(request.request_id)
        if prefill is not None and reason.succeeded and self._mode.gives_back:
            self.returns.give_back(request, prefill, now_ns)
        if reason.succeeded:
            self._deposit(request, now_ns)
        self.transfers.keep_paths(request.block_table.view, request.holder)

    def _deposit(self, request: Request, now_ns: int) -> None:
        """Offers to the store what a request leaves in the index here."""
        self.deposits.offer(request.tokens.view[: request.num_computed], now_ns)

    def receive(self, sender: int, message: PoolMessage, here: Mapping[str, Served], now_ns: int) -> None:
        """Takes a message between two steps. here: the requests of this instance."""
        if isinstance(message, Ask) and self.transfers.is_new(message):
            self.returns.asked(message, here)
        self.transfers.receive(sender, message, now_ns)

    def receive_beside(self, sender: int, message: PoolMessage, here: Mapping[str, Served], now_ns: int) -> bool:
        """Takes a message that may come in the middle of a step, if it is such a one; else False.

        What answers a ticket or a Fetch of this instance, what somebody asks to be sent, and what is offered to it at
        best effort while there is room: none of them touches what the step computes with, and no contents of blocks are
        moved within this instance. A request that is handed over is given room between two steps, as one that waits
        here is, and only then does anything enter the index.
        """
        if message.ticket[0] == self.transfers.incarnation:
            self._answered(sender, message, now_ns)
        elif isinstance(message, Fetch):
            self.fetches.receive(sender, message, now_ns)
        elif isinstance(message, Ask) and self.transfers.has_room_beside(message):
            self.receive(sender, message, here, now_ns)
        else:
            return False
        return True

    def _answered(self, sender: int, message: PoolMessage, now_ns: int) -> None:
        if isinstance(message, Wait):
            self._wait_or_stay(message, now_ns)
        if not (isinstance(message, Refuse) and self.fetches.refused(message, now_ns)):
            self.transfers.receive(sender, message, now_ns)

    def _wait_or_stay(self, message: Wait, now_ns: int) -> None:
        """There is no room for a request now: one that was decoded here goes on meanwhile, not waits."""
        handoff = self._of_ticket(message.ticket)
        if handoff is not None and handoff.migrates and not handoff.ticket.ended:
            handoff.ticket.refused = True
            self.transfers.cancel(handoff.ticket, f"{DECLINED}: no room now", now_ns)

    def poll(self, now_ns: int) -> list[Ticket]:
        """Lets time pass; the tickets that have ended."""
        self.fetches.let_time_pass(now_ns)
        ended = self.transfers.poll(now_ns)
        for ticket in ended:
            self.fetches.ended(ticket)
            self.bequest.ended(ticket, now_ns)
            self.deposits.ended(ticket, now_ns)
            self.migrations.ended(ticket)
        return ended

    def peer_gone(self, incarnation: int, now_ns: int) -> None:
        """Another instance's process is gone."""
        self.transfers.peer_gone(incarnation, now_ns)
        self.fetches.peer_gone(incarnation, now_ns)

    def drain_outbox(self) -> list[tuple[int, PoolMessage]]:
        """(incarnation, message) pairs to deliver."""
        return self.transfers.drain_outbox() + self.fetches.drain_outbox()

    def next_time_ns(self) -> int | None:
        """When `poll` has something to do because of time alone; None when never."""
        return earliest(self.transfers.next_time_ns(), self.fetches.next_time_ns())

    def take(self, arrival: Arrival, here: Mapping[str, Served], label: str) -> HandedOver | Message | None:
        """A request that came, whose KV its ticket holds until `take_over`; else it is settled, and this is to be told.

        here: the requests of this instance, whose name is `label`.
        """
        word = read_word(arrival.private)
        if isinstance(word, HandedOver) and not self.given_up.has(word, here.get(word.request_id)):
            return word
        if isinstance(word, FetchedKV):
            self.fetches.arrived(word, arrival)
            self.deposits.came(arrival)
        self.transfers.settle(arrival)
        if isinstance(word, HandedOver):  # its prefill instance may have let go of it before it heard of that
            return Finished(word.request_id, word.attempt, *CANCELLED, word.stats)
        if isinstance(word, GivenBack):
            self.deposits.offer(arrival.tokens, arrival.received_ns)
        is_left = isinstance(word, Bequeathed | Deposited | SentAhead)
        return Inherited(label, pack_tokens(arrival.tokens)) if is_left else None

    def take_over(self, word: HandedOver, arrival: Arrival) -> Request:
        """The request that has arrived; from now on it holds the blocks, not the ticket."""
        request = request_of(word)
        request.block_table.extend(arrival.blocks)
        self.transfers.settle(arrival, heir=request.holder)
        return request

    def _of_ticket(self, ticket_id: tuple[int, int]) -> _Handoff | None:
        """The hand-off that waits for this ticket, and not for a later one by now."""
        handoff = self._on_the_way.get(self._request_ids.get(ticket_id, ""))
        return handoff if handoff is not None and handoff.ticket.ticket_id == ticket_id else None

    def _still_there(self, prefill: int | None) -> int | None:
        """The instance that prefilled a request, if it may get KV back: who came since it left has not heard of it."""
        return prefill if prefill is not None and self.transfers.knows(prefill) else None

    def _begin(self, request: Request, decode: int, now_ns: int) -> None:
        """A chunk of the request is about to be computed: asks, if that was not done before an earlier one. What is
        cached is ready in every layer at once.

        The chunk waits for no grant: what is computed until that comes leaves then. To compute only what is granted
        would leave this instance idle while the other is full, and to ask earlier would hold room there for prompts
        that nobody computes yet.
        """
        earlier = self._on_the_way.get(request.request_id)
        if earlier is None or earlier.num_preemptions != request.num_preemptions:
            self.drop(request.request_id, "the request starts again", now_ns)
            ticket = self._start(request, decode, now_ns, prefill=self.transfers.incarnation, ready=False)
            self._marks.computed([(ticket, request)], now_ns, now_ns)

    def _start(
        self, request: Request, target: int, now_ns: int, *, prefill: int | None, migrates: bool = False,
        ready: bool = True,
    ) -> Ticket:  # fmt: skip
        """Asks `target` for room. ready: the KV is there, of all tokens but the last; else it will be, of a prompt."""
        num_tokens = request.num_computed if ready else request.num_prompt
        num_blocks = -(-num_tokens // self.transfers.geometry.block_size)
        tokens, blocks = request.tokens.view[:num_tokens], request.block_table.view[:num_blocks]
        options = TransferOptions(insert=self._mode.keeps_received)
        word = packed(request, None, prefill, migrates=migrates)
        ticket = self.transfers.start(target, tokens, blocks, options, word, now_ns, ready=ready, told=ready)
        if migrates:  # should it go on here after all, it may be preempted while something is still on its way
            self.transfers.keep_paths(request.block_table.view, request.holder)
        handoff = _Handoff(request, ticket, now_ns, prefill, migrates, request.num_preemptions)
        self._on_the_way[request.request_id] = handoff
        self._request_ids[ticket.ticket_id] = request.request_id
        tickets = [handoff.ticket for handoff in self._on_the_way.values()]
        waiting = sum(not (ticket.ended or self.transfers.is_granted(ticket)) for ticket in tickets)
        self.peak_waiting = max(self.peak_waiting, waiting)
        return ticket

    def _tell(self, request: Request, stats: RequestStats) -> None:
        """What the receiver is to know of a request that is on its way."""
        handoff = self._on_the_way[request.request_id]
        if not handoff.migrates:  # times are those of the first hand-off
            stats = msgspec.structs.replace(stats, asked_ns=handoff.asked_ns)
        handoff.stats = stats
        self.transfers.tell(handoff.ticket, packed(request, stats, handoff.prefill, migrates=handoff.migrates))
