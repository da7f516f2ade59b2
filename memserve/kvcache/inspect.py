"""Inspect: what a block is and who keeps it alive, for people. Reads a pool's books, changes nothing, is not fast."""

from dataclasses import dataclass

import numpy as np

from memserve.kvcache import address
from memserve.kvcache.address_book import AddressBook
from memserve.kvcache.allocator import Holder
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.errors import StaleAddress
from memserve.kvcache.inputs import as_addrs


@dataclass(frozen=True)
class BlockStory:
    """One address explained.

    state: "in use", "free", "stale" (freed since, its holders are of the block's present life and left out), or "not of
    this pool".  holders: everyone who keeps the block alive.  tokens: int32 [n], the cached path up to and including
    this block, whose own tokens are the last `block_size`; None when the index does not hold it.
    """

    addr: int
    state: str
    holders: tuple[Holder, ...] = ()
    tokens: np.ndarray | None = None
    block_size: int = 0

    def __str__(self) -> str:
        line = f"{address.describe(self.addr)}: {self.state}"
        if self.holders:
            line += ", held by " + ", ".join("/".join(map(str, holder)) for holder in self.holders)
        if self.tokens is None:
            return line + (", not cached" if self.state == "in use" else "")
        first = len(self.tokens) - self.block_size
        return f"{line}, caches tokens {self.tokens[first:].tolist()} at [{first}, {len(self.tokens)}) of their prompt"


def explain(addr: int, blocks: BlockPool, book: AddressBook) -> BlockStory:
    """What the books say of an address. Never raises StaleAddress: staleness is an answer here."""
    addrs = as_addrs([addr])
    addr = int(addrs[0])
    try:
        block = int(book.resolve(addrs)[0])
    except StaleAddress:
        return BlockStory(addr, _why_stale(addrs, blocks, book))
    holders = tuple(blocks.allocator.holders_of(block))
    return BlockStory(addr, "in use" if holders else "free", holders, _path_to(block, blocks), blocks.block_size)


def _why_stale(addrs: np.ndarray, blocks: BlockPool, book: AddressBook) -> str:
    medium = int(address.medium_of(addrs)[0])
    capacity = (blocks.allocator.num_blocks, blocks.allocator.num_dram_blocks, 0, 0)[medium]
    ours = address.incarnation_of(addrs)[0] == book.incarnation and address.block_of(addrs)[0] < capacity
    return "stale" if ours else "not of this pool"


def _path_to(block: int, blocks: BlockPool) -> np.ndarray | None:
    for tokens, path in blocks.index.iter_prefixes():
        places = np.flatnonzero(path == block)
        if len(places):
            return tokens[: (int(places[0]) + 1) * blocks.block_size].copy()
    return None
