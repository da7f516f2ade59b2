"""Migrations: answers that are to go on elsewhere, until they leave this instance. Sans-IO; decides not who or where.

    asked -> it decodes here -> it stops, and is handed over (handoff.py)
                             -> live: what is final of its KV goes ahead while it is decoded, by a best-effort
                                transfer_with_insert
                                -> DONE: what is new since goes ahead, or it stops; Grant says what need not move again
                                -> declined for want of room, or FAILED: it stays, and never stood still

What went ahead is held by nobody there but that instance's index: should it be evicted before the answer comes, it
moves once more.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from memserve.kvcache.ticket import Ticket, TicketState, TransferOptions
from memserve.kvcache.transfers import Transfers
from memserve.request import Request
from memserve.sched.migration import MigrationPolicy
from memserve.values import given_bool


class SentAhead(msgspec.Struct, frozen=True, tag=True):
    """KV of an answer that is to go on at the receiver."""


_WORD, _OPTIONS = msgspec.msgpack.encode(SentAhead()), TransferOptions(insert=True, best_effort=True)


@dataclass
class _Ahead:
    """What went ahead of an answer. num_blocks: that are there, or on their way.  num_new: of these, those that the
    latest copy was asked for.  ticket: under way; None between copies.
    """

    target: int
    request: Request
    num_blocks: int = 0
    num_new: int | None = None
    ticket: Ticket | None = None


class Migrations:
    """One instance's."""

    def __init__(self, transfers: Transfers, policy: MigrationPolicy) -> None:
        self._transfers, self._policy = transfers, policy
        self._asked: dict[str, int] = {}  # request_id -> incarnation of the target, of those that go on with leaving
        self._ahead: dict[str, _Ahead] = {}
        self._declined: list[tuple[Request, Ticket]] = []

    def ask(self, request: Request, target: int) -> None:
        """An answer is to go on at another instance, as soon as it decodes here; at this one: it is to stay."""
        self._asked.pop(request.request_id, None)
        if target != self._transfers.incarnation:
            self._asked[request.request_id] = target

    def is_asked(self, request_id: str) -> bool:
        """Whether a request stops after the step in which it is, or another copy of it goes ahead."""
        return request_id in self._asked

    def stopping(
        self, decoding: Callable[[Iterable[str]], Sequence[Request]], now_ns: int
    ) -> list[tuple[Request, int]]:
        """Those that are to stop now, and where each is to go; of others, more goes ahead. decoding: says which of
        those with these ids decode here.
        """
        asked = [(request, self._asked.pop(request.request_id)) for request in decoding(self._asked)]
        return [(request, target) for request, target in asked if not self._copy(request, target, now_ns)]

    def ended(self, ticket: Ticket) -> None:
        """A transfer of this instance has ended."""
        for request_id, ahead in self._ahead.items():
            if ahead.ticket is ticket:
                ahead.ticket = None
                if ticket.state is TicketState.DONE:
                    self._asked[request_id] = ahead.target
                else:
                    del self._ahead[request_id]
                    self._declined.append((ahead.request, ticket))
                return

    def drain_declined(self) -> list[tuple[Request, Ticket]]:
        """Answers that stay, since what was to go ahead has not come to be, and its ticket."""
        declined, self._declined = self._declined, []
        return declined

    def forget(self, request_id: str) -> int:
        """A request has ended here, or has left. Tokens whose KV went ahead; what is still on its way may arrive."""
        self._asked.pop(request_id, None)
        ahead = self._ahead.pop(request_id, None)
        return 0 if ahead is None else ahead.num_blocks * self._transfers.geometry.block_size

    def _copy(self, request: Request, target: int, now_ns: int) -> bool:
        """Sends ahead what is final and new since the copy before, if the policy wants that, and says whether."""
        num_full = request.num_computed // self._transfers.geometry.block_size
        ahead = self._ahead.get(request.request_id)
        if ahead is None or ahead.target != target:
            ahead = _Ahead(target, request)
        num_left = num_full - ahead.num_blocks
        if num_left <= 0:
            return False
        if not given_bool(self._policy, "copies_ahead", self._policy.copies_ahead(num_left, ahead.num_new)):
            return False
        tokens = request.tokens.view[: num_full * self._transfers.geometry.block_size]
        blocks = request.block_table.view[:num_full]
        ahead.num_blocks, ahead.num_new = num_full, num_left
        ahead.ticket = self._transfers.start(target, tokens, blocks, _OPTIONS, _WORD, now_ns)
        self._transfers.keep_paths(request.block_table.view, request.holder)  # it may be preempted meanwhile
        self._ahead[request.request_id] = ahead
        return True
