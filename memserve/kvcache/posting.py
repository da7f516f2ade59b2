"""Posting: hands to the transport what of a ticket's blocks is final and the receiver lacks. Ends no ticket.

blocks are final in a layer -> the granularity names stretches of them -> moves, on the wire from when each is final
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby

import numpy as np

from memserve.kvcache import address
from memserve.kvcache.address import Medium
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.granularity import End, Granularity, Stretch
from memserve.kvcache.outgoing import Outgoing
from memserve.transfer.transport import Move, Transport


class Posting:
    """Of all tickets of one pool."""

    def __init__(self, pool: BlockPool, transport: Transport, granularity: Granularity) -> None:
        self._pool, self._transport, self._granularity = pool, transport, granularity

    def ready(self, out: Outgoing, ready_ns: int) -> None:
        """What is final by now leaves from ready_ns on. Raises ValueError where the granularity names what is not, or
        has left before.
        """
        self._post(out, self._next(out, ready_ns))

    def marked(self, out: Outgoing, num_blocks: int, layers_ns: Mapping[int, int]) -> None:
        """The first `num_blocks` blocks are final in these layers, since when each. Raises ValueError as `ready`."""
        stretches: list[tuple[Stretch, int]] = []
        for layer, ready_ns in layers_ns.items():
            if num_blocks > out.ready[layer]:
                out.ready[layer] = num_blocks
                stretches += self._next(out, ready_ns)
        self._post(out, stretches)

    def _next(self, out: Outgoing, ready_ns: int) -> list[tuple[Stretch, int]]:
        """What is final since ready_ns and has not left; from now on it has."""
        stretches = self._granularity.stretches(out.posted, out.ready, len(out.blocks))
        for stretch in stretches:
            layers = range(len(out.ready)) if stretch.layer is None else (stretch.layer,)
            if not all(out.posted[i] == stretch.start <= stretch.stop <= out.ready[i] for i in layers):
                name, posted, ready = type(self._granularity).__name__, out.posted[[*layers]], out.ready[[*layers]]
                raise ValueError(f"{name}.stretches gave {stretch}: expected blocks from {posted} to {ready} at most")
            out.posted[slice(None) if stretch.layer is None else stretch.layer] = stretch.stop
        return [(stretch, ready_ns) for stretch in stretches]

    def _post(self, out: Outgoing, stretches: Sequence[tuple[Stretch, int]]) -> None:
        """What of these the receiver lacks; layers that follow each other with the same blocks at once."""
        for (start, stop), alike in groupby(stretches, lambda entry: (entry[0].start, entry[0].stop)):
            start = max(start, out.first_block)
            if start < stop:
                self._post_blocks(out, start, stop, {stretch.layer: ready_ns for stretch, ready_ns in alike})

    def _post_blocks(self, out: Outgoing, start: int, stop: int, layers_ns: Mapping[int | None, int]) -> None:
        """In each of these layers a move for each pair of media that blocks lie in, and of ranks that share heads."""
        out.counts.transfers += self._granularity.transfers_per_stretch * len(layers_ns)
        moves = [self._granularity.moves_by_layer(*ends, [*layers_ns]) for ends in self._ends(out, start, stop)]
        for ready_ns, of_layer in zip(layers_ns.values(), zip(*moves, strict=True), strict=True):
            for move in chain.from_iterable(of_layer):
                self._post_move(out, move, ready_ns)

    def _ends(self, out: Outgoing, start: int, stop: int) -> Iterator[tuple[End, End]]:
        """Where blocks lie here and there, for each pair of media."""
        num_hbm, num_dram = self._pool.num_blocks, self._pool.allocator.num_dram_blocks
        sizes, first = (num_hbm, num_dram), (0, num_hbm)
        pool, num_ranks = out.target_pool, self._granularity.num_ranks
        target_sizes = (pool.num_hbm_blocks, pool.num_dram_blocks)
        blocks, addrs = out.blocks[start:stop], out.targets[start - out.first_block : stop - out.first_block]
        pairs = len(Medium) * (blocks >= num_hbm) + address.medium_of(addrs)
        for pair in np.flatnonzero(np.bincount(pairs)).tolist():
            source, target = divmod(pair, len(Medium))
            chosen = pairs == pair
            here = End((out.ask.ticket[0], source), sizes[source], blocks[chosen] - first[source], num_ranks)
            where = address.block_of(addrs[chosen])
            yield here, End((out.peer, target), target_sizes[target], where, pool.num_ranks)

    def _post_move(self, out: Outgoing, move: Move, ready_ns: int) -> None:
        self._transport.post((*out.ask.ticket, out.num_parts), move, ready_ns)
        out.num_parts += 1
        out.num_under_way += 1
        out.num_bytes += move.num_bytes
        out.counts.bytes += move.num_bytes
        out.counts.calls += move.num_calls
