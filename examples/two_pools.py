"""KV from one pool to another, on `memserve.kvcache` and `memserve.transfer` alone: who carries what, and how it ends.

    python examples/two_pools.py

A pool does no I/O: what it has to say to another lies in its outbox until you bring it there, and time is what you say
to `poll`. Here the wire is this process, where a message takes no time and bytes take what a LinkModel says.
"""

import torch

from memserve.kvcache import AggregatedLayout, CacheGeometry, MemPool, RadixIndex, Ticket, Timeouts
from memserve.kvcache.granularity import Packed
from memserve.transfer.in_process import InProcess
from memserve.transfer.link import LinkModel

GEOMETRY = CacheGeometry(num_layers=2, block_size=4, num_kv_heads=1, head_dim=8, dtype=torch.float32)
TIMEOUTS = Timeouts(deadline_ns=10**9, patience_ns=10**9, retry_ns=10**8)
US = 1000


def two_pools(link: LinkModel) -> dict[int, MemPool]:
    """By their incarnation, the number by which a transfer names the other."""
    transport, layout = InProcess(link), AggregatedLayout()
    pools = {i: MemPool(GEOMETRY, layout, num_blocks=16, index=RadixIndex, incarnation=i) for i in (0, 1)}
    for pool in pools.values():
        pool.connect(transport, Packed(layout, GEOMETRY), TIMEOUTS)
    return pools


def deliver(pools: dict[int, MemPool], now_ns: int) -> list[Ticket]:
    """Brings every message to its pool, and lets time pass; the tickets that have ended.

    What arrived is held by its ticket until it is settled: here at once, so that it is cached and nobody uses it.
    """
    for sender, pool in pools.items():
        for receiver, message in pool.transfers.drain_outbox():
            pools[receiver].transfers.receive(sender, message, now_ns)
    ended = [ticket for pool in pools.values() for ticket in pool.poll(now_ns)]
    for pool in pools.values():
        for arrival in pool.transfers.drain_arrivals():
            pool.transfers.settle(arrival)
    return ended


if __name__ == "__main__":
    pools = two_pools(LinkModel(latency_s=5e-6, gb_per_s=50))
    here, there, me, prompt = pools[0], pools[1], ("request", "r0"), list(range(8))
    addrs = here.alloc_mem(2, holder=me)
    here.kv[:, :, here.resolve(addrs)] = 7.0  # what a model would compute
    ticket = here.transfer_with_insert(1, prompt, addrs)
    here.free_mem(addrs, holder=me)  # the ticket holds them until it has ended
    now_ns = 0
    while not (ended := deliver(pools, now_ns)):
        now_ns += US
    assert ended == [ticket]
    found = there.match(prompt)
    right = bool((there.kv[:, :, there.resolve(found.addrs)] == 7.0).all())
    print(f"{ticket.state} after {now_ns // US} us: {found.num_tokens} tokens cached there, contents right: {right}")
    for pool in pools.values():
        pool.check()
