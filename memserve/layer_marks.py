"""LayerMarks: which blocks of a prompt are final in which layer, so that they may leave while the rest is computed.

    chunk under way -> a layer of it is written -> its whole blocks are final there; of the last chunk all blocks are

Knows requests and tickets; decides neither who is sent where nor in how many calls.
"""

from collections.abc import Mapping, Sequence

from memserve.kvcache.ticket import Ticket
from memserve.kvcache.transfers import Transfers
from memserve.request import Request


class LayerMarks:
    """Of the prompts that one instance hands over by layer."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers

    def written(self, ticket: Ticket, request: Request, num_computed: int, layers_ns: Mapping[int, int]) -> None:
        """The request's first `num_computed` tokens have their KV in these layers, since when in each."""
        self._transfers.mark_ready(ticket, self._num_final(request, num_computed), layers_ns)

    def computed(self, here: Sequence[tuple[Ticket, Request]], began_ns: int, ended_ns: int) -> None:
        """What these have computed has its KV in all layers: those of which `written` was not told evenly in a step."""
        num_layers = self._transfers.geometry.num_layers
        layers_ns = {i: began_ns + (ended_ns - began_ns) * (i + 1) // num_layers for i in range(num_layers)}
        for ticket, request in here:
            self.written(ticket, request, request.num_computed, layers_ns)

    def _num_final(self, request: Request, num_computed: int) -> int:
        """Leading blocks that nothing more is written into before the request is handed over."""
        block_size = self._transfers.geometry.block_size
        if num_computed >= request.num_prompt:
            return -(-request.num_prompt // block_size)
        return num_computed // block_size
