"""Two or more pools and the wires between them, played by hand: deliver messages, let time pass, look at the bytes."""

import itertools

import numpy as np
import torch

from memserve.kvcache import AggregatedLayout, BlockPool, CacheGeometry, DiscreteLayout, NullIndex, RadixIndex
from memserve.kvcache.address_book import AddressBook
from memserve.kvcache.arena import Arena
from memserve.kvcache.granularity import ByLayer, ByRequest, ByRequestAgg, Packed
from memserve.kvcache.ticket import GrantLimits, Timeouts
from memserve.kvcache.transfers import Transfers
from memserve.transfer import LinkModel, StallingTransport

B = 4
SHAPE = CacheGeometry(num_layers=3, block_size=B, num_kv_heads=2, head_dim=4, dtype=torch.float32)
GRANULARITIES = {"by_layer": ByLayer, "by_request": ByRequest, "by_request_agg": ByRequestAgg, "packed": Packed}
LAYOUTS = {"discrete": DiscreteLayout, "aggregated": AggregatedLayout}
TIMEOUTS = Timeouts(deadline_ns=1_000_000, patience_ns=5_000_000, retry_ns=100_000)
LINK = LinkModel(latency_s=1e-6, gb_per_s=1.0)
REQUEST = ("request", "r", 0)


class Pool:
    """A pool with real memory and its end of the protocol."""

    def __init__(self, transport, incarnation, *, num_blocks=32, num_dram_blocks=0, index=RadixIndex,
                 granularity="by_request", layout="discrete", headroom_blocks=0, max_best_effort=None):  # fmt: skip
        shape, timeouts = SHAPE, TIMEOUTS
        self.blocks = BlockPool(num_blocks, shape.block_size, index, num_dram_blocks=num_dram_blocks)
        plan = LAYOUTS[layout]()
        self.arenas = [Arena(plan, shape, n, torch.device("cpu")) for n in (num_blocks, num_dram_blocks)]
        for arena in self.arenas:
            arena.tensor.fill_(-incarnation)
        self.book = AddressBook(self.blocks.allocator, incarnation)
        memories = [arena.tensor for arena in self.arenas]
        by = GRANULARITIES[granularity](plan, shape)
        limits = GrantLimits(headroom_blocks, max_best_effort)
        self.transfers = Transfers(self.blocks, self.book, transport, memories, by, timeouts, limits)

    def kv(self, blocks):
        """[L, 2, n, B, K, D] of block numbers in either medium."""
        num_hbm = self.blocks.num_blocks
        parts = [self.arenas[b >= num_hbm].kv[:, :, b - num_hbm * (b >= num_hbm)] for b in blocks.tolist()]
        return torch.stack(parts, 2)

    def fill(self, num_tokens, holder=REQUEST, medium=0, seed=0):
        """New blocks with random KV for num_tokens tokens."""
        blocks = self.blocks.alloc(self.blocks.blocks_for(num_tokens), holder, medium)
        rng = torch.Generator().manual_seed(seed)
        for b in blocks.tolist():
            in_dram = b >= self.blocks.num_blocks
            part = self.arenas[in_dram].kv[:, :, b - (self.blocks.num_blocks if in_dram else 0)]
            part.copy_(torch.randn(part.shape, generator=rng))
        return blocks


class Wires:
    """Delivers every message at once, in order, unless `lose` says otherwise."""

    def __init__(self, *, link=LINK, **options):
        self.transport = StallingTransport(link)
        self.pools = {}
        self.options = options
        self.now_ns = 0
        self.log = []
        self.ended = []
        self.lose = lambda message: False

    def pool(self, incarnation, **options):
        self.pools[incarnation] = Pool(self.transport, incarnation, **(self.options | options))
        return self.pools[incarnation]

    def deliver(self):
        """Until nobody has anything to say at this moment."""
        for _ in itertools.count():
            said = False
            for incarnation, pool in list(self.pools.items()):
                self.ended += pool.transfers.poll(self.now_ns)
                for peer, message in pool.transfers.drain_outbox():
                    said = True
                    self.log.append(type(message).__name__)
                    if not self.lose(message) and peer in self.pools:
                        self.pools[peer].transfers.receive(incarnation, message, self.now_ns)
            if not said:
                break

    def run(self, until_ns=50_000_000):
        """Lets time pass until no ticket is open, or until_ns."""
        self.deliver()
        while any(p.transfers.num_open for p in self.pools.values()) and self.now_ns < until_ns:
            self.let_time_pass(until_ns)
            self.deliver()
            self.check()

    def let_time_pass(self, until_ns=None):
        """To when anything happens by itself, or until_ns."""
        times = [self.transport.next_time_ns(), *(p.transfers.next_time_ns() for p in self.pools.values())]
        self.now_ns = max(self.now_ns, min(t for t in [*times, until_ns] if t is not None))

    def check(self):
        for pool in self.pools.values():
            pool.transfers.check()
            pool.blocks.check()


def tokens(n, first=0):
    return np.arange(first, first + n, dtype=np.int32)


__all__ = ["GRANULARITIES", "LAYOUTS", "REQUEST", "SHAPE", "TIMEOUTS", "B", "NullIndex", "Pool", "Wires", "tokens"]
