"""Fetches: KV that this instance gets from others instead of computing it, and what others get from it. Sans-IO.

    requester   offered -> decided once a batch -> Fetch -> the holder's transfer arrives            -> ready: fetched
                                                         -> Refuse, deadline or the holder is gone   -> the next holder
                                                -> nothing is sent                                   -> ready: computed
    next holder the one with most of those named that were not asked: decided anew, of this request alone; none is left
                that holds more than is here                                                         -> ready: computed
    holder      Fetch -> what it still holds more of: a best-effort transfer_with_insert; else Refuse

A request waits here, holding no block, until it is ready; then the local scheduler has it as any other. What was
fetched is found in the index. Whatever goes wrong costs time: each who was named is asked once, then the prompt is
computed. A Fetch is repeated until something comes; a repeated one changes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from memserve.decisions import FetchRecord, Holding
from memserve.kvcache.alarms import Alarms
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.ticket import Arrival, Ticket, TicketState, Timeouts, TransferOptions
from memserve.kvcache.transfers import Transfers
from memserve.latest import Latest
from memserve.messages import Fetch, PoolMessage, Refuse, pack_tokens, unpack_tokens
from memserve.request import Phase, Request
from memserve.sched.admission import usable_prefix
from memserve.sched.fetch_policy import Choice, FetchPolicy, FetchPrices
from memserve.values import given_bool

NUM_REMEMBERED = 4096  # fetches that were served, so that a repeated Fetch is not served twice


class FetchedKV(msgspec.Struct, frozen=True, tag=True):
    """What travels beside KV that was asked for: which Fetch it answers."""

    fetch: tuple[int, int]


@dataclass(frozen=True)
class _Candidate:
    """The holder of whom a request may have KV. others: named for it, and not asked yet.  earlier: what came of those
    that were asked.
    """

    request: Request
    holder: int
    choice: Choice
    others: Sequence[Holding]
    earlier: tuple[FetchRecord, ...]


@dataclass
class _Open:
    """A fetch that has not come. others: holders that are left to be asked."""

    request: Request
    others: Sequence[Holding]
    message: Fetch
    record: FetchRecord
    retry_ns: int
    deadline_ns: int

    @property
    def next_time_ns(self) -> int:
        """When time alone does something to it."""
        return min(self.retry_ns, self.deadline_ns)


class Fetches:
    """One instance's fetches, of both ends. timeouts: a fetch that has not come by the deadline is given up."""

    def __init__(
        self, transfers: Transfers, pool: BlockPool, policy: FetchPolicy, prices: FetchPrices, timeouts: Timeouts
    ) -> None:
        self._transfers, self._pool, self._policy, self._prices = transfers, pool, policy, prices
        self._timeouts = timeouts
        self._offers: list[tuple[Request, Sequence[Holding]]] = []
        self._open: dict[tuple[int, int], _Open] = {}
        self._alarms: Alarms[tuple[int, int]] = Alarms()
        self._ready: list[tuple[Request, FetchRecord | None]] = []
        self._served: Latest[tuple[int, int], Ticket] = Latest(NUM_REMEMBERED)
        self._outbox: list[tuple[int, PoolMessage]] = []
        self._gone: set[int] = set()
        self._num_fetches = 0

    @property
    def num_open(self) -> int:
        """Requests that wait here for KV."""
        return len(self._open)

    def takes(self, holdings: Sequence[Holding]) -> bool:
        """Whether a request of which others are said to hold this much is to be offered."""
        return self._policy.looks_elsewhere and bool(holdings)

    def offer(self, request: Request, holdings: Sequence[Holding]) -> None:
        """Takes a request of which others hold more; `decide` is next."""
        request.phase = Phase.FETCHING
        self._offers.append((request, holdings))

    def decide(self, num_cached: Callable[[Request], int], now_ns: int) -> None:
        """Fetch or compute, once for all that was offered since the last call. num_cached: tokens found here."""
        offers, self._offers = self._offers, []
        batch: list[_Candidate] = []
        for request, holdings in offers:
            best = self._best(request, holdings, num_cached(request))
            if best is None:
                self._ready.append((request, None))
            else:
                batch.append(best)
        if batch:
            self._choose(batch, now_ns)

    def _choose(self, batch: Sequence[_Candidate], now_ns: int) -> None:
        """Fetch or compute, for all of a batch at once."""
        choices = [candidate.choice for candidate in batch]
        fetch_s, compute_s = self._prices.fetch_time_s(choices), self._prices.compute_time_s(choices)
        fetched = given_bool(self._policy, "fetches", self._policy.fetches(fetch_s, compute_s))
        for one in batch:
            record = FetchRecord(
                one.holder, one.choice.num_cached, one.choice.num_held, len(batch), fetch_s, compute_s, fetched, now_ns,
                earlier=one.earlier,
            )  # fmt: skip
            if fetched:
                self._ask(one, record, now_ns)
            else:
                self._ready.append((one.request, record))

    def drain_ready(self) -> list[tuple[Request, FetchRecord | None]]:
        """Requests that wait no longer, with what was decided; None where nobody holds more after all."""
        ready, self._ready = self._ready, []
        return ready

    def drop(self, request: Request) -> None:
        """A request has ended. Should its KV still come, it is cached."""
        self._offers = [offer for offer in self._offers if offer[0] is not request]
        self._ready = [entry for entry in self._ready if entry[0] is not request]
        for ticket in [t for t, entry in self._open.items() if entry.request is request]:
            self._close(ticket)

    def receive(self, sender: int, message: Fetch, now_ns: int) -> None:
        """Somebody asks for KV. What a dead one asked for last comes too late."""
        if sender in self._gone:
            return
        ticket = self._served.get(message.ticket)
        if ticket is not None:
            self.ended(ticket)  # open: the transfer repeats itself; failed: said again
            return
        tokens = unpack_tokens(message.tokens)
        found = self._pool.index.peek(tokens, message.limit)
        if found.num_tokens <= message.num_held:
            reason = f"{found.num_tokens} tokens are held, no more than the {message.num_held} there"
            self._outbox.append((sender, Refuse(message.ticket, reason)))
            return
        private, options = (
            msgspec.msgpack.encode(FetchedKV(message.ticket)),
            TransferOptions(insert=True, best_effort=True),
        )
        sent = tokens[: self._pool.match(tokens, found.num_tokens).num_tokens]
        self._served[message.ticket] = self._transfers.start(sender, sent, found.blocks, options, private, now_ns)

    def ended(self, ticket: Ticket) -> None:
        """A transfer has ended: if it answered a Fetch and failed, whoever asked is told."""
        if ticket.state is TicketState.FAILED:
            for fetch, served in self._served.items():
                if served is ticket and fetch[0] not in self._gone:
                    self._outbox.append((fetch[0], Refuse(fetch, ticket.reason)))

    def refused(self, message: Refuse, now_ns: int) -> bool:
        """Takes a Refuse if it answers a Fetch of this instance."""
        if message.ticket[1] >= 0:
            return False
        self._fail(message.ticket, "refused", message.reason, now_ns)
        return True

    def arrived(self, word: FetchedKV, arrival: Arrival) -> None:
        """KV is here, and in the index."""
        entry = self._close(word.fetch)
        if entry is not None:
            num_fetched = len(arrival.tokens) - arrival.num_held
            came = msgspec.structs.replace(
                entry.record, outcome="fetched", num_fetched=num_fetched,
                arrived_ns=arrival.arrived_ns, ended_ns=arrival.received_ns,
            )  # fmt: skip
            self._ready.append((entry.request, came))

    def let_time_pass(self, now_ns: int) -> None:
        """Asks again, and gives up what has not come by its deadline."""
        for ticket in reversed(self._alarms.due(now_ns)):  # in the order in which they were begun
            entry = self._open[ticket]
            if now_ns >= entry.deadline_ns:
                self._fail(ticket, "failed", "not all of the KV came within the deadline", now_ns)
            else:
                entry.retry_ns = now_ns + self._timeouts.retry_ns
                self._alarms.put(ticket, entry.next_time_ns)
                self._outbox.append((entry.record.holder, entry.message))

    def peer_gone(self, incarnation: int, now_ns: int) -> None:
        """An instance's process is gone: nothing comes from it any more."""
        self._gone.add(incarnation)
        for ticket in [t for t, entry in self._open.items() if entry.record.holder == incarnation]:
            self._fail(ticket, "failed", f"instance {incarnation} is gone", now_ns)

    def drain_outbox(self) -> list[tuple[int, PoolMessage]]:
        """(incarnation, message) pairs to deliver."""
        out, self._outbox = self._outbox, []
        return out

    def next_time_ns(self) -> int | None:
        """When `let_time_pass` has something to do."""
        return self._alarms.next_ns()

    def _best(
        self, request: Request, holdings: Sequence[Holding], num_cached: int, earlier: tuple[FetchRecord, ...] = ()
    ) -> _Candidate | None:
        """Who holds most and what that is, or None if it is no more than what is here."""
        me, size = self._transfers.incarnation, self._pool.block_size
        others = [h for h in holdings if h.instance != me and h.instance not in self._gone]
        if not others:
            return None
        best = max(others, key=lambda h: h.num_tokens)
        num_held = min(best.num_tokens, usable_prefix(request.num_tokens)) // size * size
        if num_held <= num_cached:
            return None
        others.remove(best)
        choice = Choice(request.num_tokens, num_cached, num_held)
        return _Candidate(request, best.instance, choice, others, earlier)

    def _ask(self, asked: _Candidate, record: FetchRecord, now_ns: int) -> None:
        self._num_fetches += 1
        ticket = (self._transfers.incarnation, -self._num_fetches)  # no transfer has a number below 0
        request, choice = asked.request, asked.choice
        tokens = pack_tokens(np.ascontiguousarray(request.tokens.view[: choice.num_held]))
        message = Fetch(ticket, tokens, choice.num_held, choice.num_cached)
        times = now_ns + self._timeouts.retry_ns, now_ns + self._timeouts.deadline_ns
        entry = self._open[ticket] = _Open(request, asked.others, message, record, *times)
        self._alarms.put(ticket, entry.next_time_ns)
        self._outbox.append((asked.holder, message))

    def _fail(self, ticket: tuple[int, int], outcome: str, reason: str, now_ns: int) -> None:
        """Whoever was asked sends nothing: the next holder's turn, while the request waits here anyway."""
        entry = self._close(ticket)
        if entry is None:
            return
        request = entry.request
        record = msgspec.structs.replace(entry.record, outcome=outcome, reason=reason, ended_ns=now_ns)
        earlier = (*record.earlier, msgspec.structs.replace(record, earlier=()))
        found = self._pool.index.peek(request.tokens.view, usable_prefix(request.num_tokens))
        best = self._best(request, entry.others, found.num_tokens, earlier)
        if best is None:
            self._ready.append((request, record))
        else:
            self._choose([best], now_ns)

    def _close(self, ticket: tuple[int, int]) -> _Open | None:
        """Nothing more is waited for, if anything was."""
        self._alarms.put(ticket, None)
        return self._open.pop(ticket, None)
