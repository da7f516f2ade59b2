"""Returns: KV on its way back from where a request was decoded to the instance that prefilled it (step 5 of Table 4).

    finished -> its full blocks, where it generated any -> a best-effort transfer_with_insert, never repeated

The next turn of a session may come before: then the return was overtaken, and is counted at the receiver. Sans-IO.
"""

from collections.abc import Mapping

import msgspec

from memserve.kvcache.ticket import TransferOptions
from memserve.kvcache.transfers import Transfers
from memserve.messages import Ask
from memserve.request import Request
from memserve.served import Served
from memserve.words import GivenBack, read_word

_OPTIONS = TransferOptions(insert=True, best_effort=True)


class Returns:
    """One instance's, of both ends. num_overtaken: that came too late here."""

    def __init__(self, transfers: Transfers) -> None:
        self.num_overtaken = 0
        self._transfers = transfers

    def give_back(self, request: Request, prefill: int, now_ns: int) -> None:
        """Sends the full blocks of a finished request to the instance that prefilled it, at its convenience."""
        size = self._transfers.geometry.block_size
        num_full = request.num_computed // size
        if num_full > request.num_prompt // size:
            tokens, blocks = request.tokens.view[: num_full * size], request.block_table.view[:num_full]
            word = msgspec.msgpack.encode(GivenBack(request.session_id))
            self._transfers.start(prefill, tokens, blocks, _OPTIONS, word, now_ns)

    def asked(self, ask: Ask, here: Mapping[str, Served]) -> None:
        """Somebody asks for room here, for the first time. here: the requests of this instance."""
        word = read_word(ask.private)
        if isinstance(word, GivenBack):
            self.num_overtaken += any(s.request.session_id == word.session_id for s in here.values())

    def next_turn(self, session_id: str) -> None:
        """A request of a session is here: what is on its way back for an earlier turn was overtaken."""
        if session_id:
            late = msgspec.msgpack.encode(GivenBack(session_id))
            self.num_overtaken += sum(ask.private == late for ask in self._transfers.open_asks)
