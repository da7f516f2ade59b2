"""MemPool: the calls of the paper's Table 1, in its order. Addresses at the edge, block numbers (block_pool.py) inside.

Table 1's `size` is `num_blocks` here, `type` `medium`, `id` `instance`. Whoever calls names a holder too, and a block
lives as long as somebody holds it. Every address that comes in is checked: another instance's, another medium's or a
freed block's raises StaleAddress and changes nothing. Threads that share a pool need a lock of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import torch

from memserve.kvcache.address import Medium, Placement
from memserve.kvcache.address_book import AddressBook
from memserve.kvcache.allocator import Holder
from memserve.kvcache.arena import Arena, TwoTiers, as_device
from memserve.kvcache.block_pool import BlockPool, IndexFactory
from memserve.kvcache.copy_engine import AtOnce, BlockCopier, CopyEngine, made_by
from memserve.kvcache.errors import NotHeld
from memserve.kvcache.events import IndexEvent, IndexSnapshot
from memserve.kvcache.granularity import Granularity
from memserve.kvcache.inputs import Tokens, as_addrs, as_blocks, as_holder, as_tokens, count_of, medium_of, named
from memserve.kvcache.inspect import BlockStory, explain
from memserve.kvcache.layout import CacheGeometry, Layout, what_fits
from memserve.kvcache.mixed import alloc_mixed
from memserve.kvcache.pool_stats import PoolStats
from memserve.kvcache.swap_tickets import SwapTickets
from memserve.kvcache.ticket import PLAIN, GrantLimits, Ticket, Timeouts, TransferOptions
from memserve.kvcache.transfers import Transfers
from memserve.transfer.transport import Transport


@dataclass(frozen=True)
class AddressMatch:
    """The longest cached prefix: `addrs` int64 [num_tokens / block_size]. Holds nothing."""

    addrs: np.ndarray
    num_tokens: int


class MemPool:
    """One instance's share of the elastic memory pool: blocks of KV in HBM and in DRAM, and the index over them.

    geometry, layout: shape of a block and how it lies in memory.  device: what HBM is; DRAM is the host's memory, and
    page-locked unless `device` is the CPU.  incarnation: this instance's number in the cluster, in every address.
    engine: copies between the two media; with `OnAThread` swaps go on beside whatever else is done, until `poll`.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        layout: Layout,
        num_blocks: int,
        index: IndexFactory,
        *,
        num_dram_blocks: int = 0,
        device: torch.device | str = "cpu",
        incarnation: int = 0,
        engine: Callable[[BlockCopier], CopyEngine] = AtOnce,
    ) -> None:
        count_of(num_blocks), count_of(num_dram_blocks, "num_dram_blocks"), count_of(incarnation, "incarnation")
        self.geometry, self.layout, self.incarnation = geometry, layout, incarnation
        self._now_ns = 0
        self._transfers: Transfers | None = None
        device = as_device(device)
        self.arena = Arena(layout, geometry, num_blocks, device)
        pinned = device.type != "cpu" and num_dram_blocks > 0
        self.dram = Arena(layout, geometry, num_dram_blocks, torch.device("cpu"), pinned=pinned)
        copies = made_by(engine, TwoTiers(self.arena, self.dram, num_blocks))
        size = geometry.block_size
        self.blocks = BlockPool(num_blocks, size, index, num_dram_blocks=num_dram_blocks, engine=copies)
        self._book = AddressBook(self.blocks.allocator, incarnation)
        self._swaps = SwapTickets(self.blocks, self._book)

    @property
    def block_size(self) -> int:
        return self.geometry.block_size

    @property
    def kv(self) -> torch.Tensor:
        """The cache in HBM as [L, 2, N, B, K, D], a strided view of the arena."""
        return self.arena.kv

    @overload
    def alloc_mem(
        self, num_blocks: int, medium: Medium | Placement = ..., *, instance: None = ..., holder: Holder
    ) -> np.ndarray: ...

    @overload
    def alloc_mem(
        self, num_blocks: int, medium: Medium | Placement = ..., *, instance: int, holder: Holder
    ) -> Ticket: ...

    def alloc_mem(
        self, num_blocks: int, medium: Medium | Placement = Medium.HBM, *, instance: int | None = None, holder: Holder
    ) -> np.ndarray | Ticket:
        """Addresses, int64 [num_blocks], of new blocks held by `holder`. What is only cached makes room as needed.

        With Placement.MIXED those in HBM come first.  instance: where; of another, returns a ticket whose addrs they
        are once it is DONE, to be given as `dst_addrs` and freed by `free_mem` here. It fails where a call there would
        raise. Raises OutOfBlocks with nothing allocated; ValueError for a negative number, an unknown medium or
        instance, or a bad holder.
        """
        count, holder = count_of(num_blocks), named(holder)
        if instance is not None and instance != self.incarnation:
            if isinstance(medium, Placement):
                raise ValueError(f"medium={medium} on instance {instance}: expected one medium for blocks elsewhere")
            return self.transfers.reserve(self._peer(instance), count, medium_of(medium), holder, self._now_ns)
        if medium == Placement.MIXED:
            return self._book.addresses(alloc_mixed(self.blocks, count, holder))
        return self._book.addresses(self.blocks.alloc(count, holder, medium_of(medium)))

    def free_mem(self, addrs: np.ndarray, *, holder: Holder) -> None:
        """Gives up `holder`'s hold; a block is freed with its last holder. Raises StaleAddress or NotHeld.

        Of addresses that `holder` has reserved on another instance: they are free when that has heard of it. What a
        `pinned` transfer has left here is held by ("transfer", sender's incarnation, n), its ticket.
        """
        addrs, holder = as_addrs(addrs), as_holder(holder)
        if self._transfers is not None and self._book.are_elsewhere(addrs):
            self._transfers.free_reserved(addrs, named(holder), self._now_ns)
            return
        pinned = self._transfers is not None and self._transfers.keeps(holder)
        self.blocks.release(self.resolve(addrs), holder if pinned else named(holder))

    def insert(self, tokens: Tokens, addrs: np.ndarray, *, holder: Holder) -> np.ndarray:
        """Maps a token prefix of whole blocks to its KV; returns the canonical addresses, int64 [n].

        This is what turns active KV into historical KV (section 4.2). Of Table 1's `flags` the paper names none, and
        nothing is left to choose. The index becomes one more holder; `holder` keeps what it holds and also takes the
        canonical blocks it did not have, to rely on them. Raises StaleAddress, NotHeld for a block that `holder` lacks,
        and ValueError for one given twice, or to be cached that is cached under another prefix, with nothing inserted.
        """
        blocks, array = self.resolve(addrs), as_tokens(tokens)
        held = self.blocks.allocator.held_by(named(holder))
        if not np.isin(blocks, held).all():
            raise NotHeld(f"{holder} inserts blocks that it does not hold")
        num_found = len(self.blocks.index.peek(array).blocks)
        elsewhere = (self.blocks.allocator.refcounts[blocks[num_found:]] & 1) == 1
        if elsewhere.any() or len(np.unique(blocks)) != len(blocks):
            raise ValueError(f"blocks {blocks.tolist()}: expected each once, and none that is cached for other tokens")
        canonical = self.blocks.publish(array, blocks)
        self.blocks.hold(canonical, holder)
        return self._book.addresses(canonical)

    def match(self, tokens: Tokens, limit: int | None = None) -> AddressMatch:
        """Longest cached prefix of tokens[:limit], in whole blocks. Holds nothing: `retain` before the next call."""
        found = self.blocks.match(as_tokens(tokens), None if limit is None else count_of(limit, "limit"))
        return AddressMatch(self._book.addresses(found.blocks), found.num_tokens)

    def retain(self, addrs: np.ndarray, *, holder: Holder) -> None:
        """Makes `holder` one more holder of blocks in use.

        Raises StaleAddress, NotHeld for a free block, and ValueError for one given twice or that `holder` has already.
        """
        blocks = self.resolve(addrs)
        held = self.blocks.allocator.held_by(named(holder))
        if len(np.unique(blocks)) != len(blocks) or np.isin(blocks, held).any():
            raise ValueError(f"{holder} retains blocks {blocks.tolist()}: expected each once, and none that it holds")
        self.blocks.retain(blocks, holder)

    def delete(self, tokens: Tokens) -> int:
        """Drops a prompt's cached data; returns how many blocks left the index."""
        return self.blocks.delete(as_tokens(tokens))

    def swap_out(self, num_blocks: int) -> Ticket:
        """Moves up to `num_blocks` cached blocks that nobody uses to DRAM, those that eviction would take first.

        The ticket's addrs say where they lie then: as many as were movable and DRAM had free, less those that somebody
        came to use before they were there. The index follows them.
        """
        return self._swaps.swap_out(count_of(num_blocks))

    def swap_in(self, addrs: np.ndarray, *, holder: Holder) -> Ticket:
        """Brings blocks that `holder` holds from DRAM back to HBM; the ticket's addrs are all of them as they are then.

        Those in HBM stay. The old addresses of the others are stale at its end unless somebody else holds them. It
        fails if `holder` gives some up before; its addrs are those of the rest then. Raises OutOfBlocks, NotHeld,
        StaleAddress, and ValueError for a block given twice or on its way already, with nothing moved.
        """
        return self._swaps.swap_in(self.resolve(addrs), named(holder))

    def connect(
        self, transport: Transport, granularity: Granularity, timeouts: Timeouts, *, headroom_blocks: int = 0
    ) -> None:
        """Joins the pools that `transport` connects, under this pool's incarnation; before the first `transfer`.

        headroom_blocks: HBM blocks that a grant leaves free, unless nothing is in use. Raises ValueError for more than
        there are, for a second time, and for a granularity that was made for blocks of another shape.
        """
        if self._transfers is not None:
            raise ValueError("this pool is connected already: expected one connect(..)")
        granularity.check(self.layout, self.geometry)
        limits = GrantLimits(count_of(headroom_blocks, "headroom_blocks", self.arena.num_blocks))
        memories = [self.arena.tensor, self.dram.tensor]
        self._transfers = Transfers(self.blocks, self._book, transport, memories, granularity, timeouts, limits)

    @property
    def transfers(self) -> Transfers:
        """This pool's end of the protocol: messages in and out, arrivals. Raises ValueError before `connect`."""
        if self._transfers is None:
            raise ValueError("this pool is connected to no other: call connect(transport, ...) first")
        return self._transfers

    def transfer(
        self,
        instance: int,
        src_addrs: np.ndarray,
        dst_addrs: np.ndarray | None = None,
        *,
        flags: TransferOptions = PLAIN,
        private: bytes = b"",
    ) -> Ticket:
        """Moves data to the pool of another instance; its index sees nothing of it.

        dst_addrs: where to, of an earlier `alloc_mem` there; without them the other instance allocates on demand, and
        holds what came until it gives the Arrival to `transfers.settle`, with an heir if somebody is to keep it. The
        ticket holds the blocks here until it has ended; `private` arrives untouched. Raises StaleAddress, NotHeld for
        a free block, and ValueError for a transfer to itself, an unknown instance or flags that insert.
        """
        if flags.insert:
            raise ValueError("flags.insert: expected transfer_with_insert, which names the tokens")
        unnamed = np.zeros(len(as_addrs(src_addrs)) * self.block_size, dtype=np.int32)
        return self._start(instance, unnamed, src_addrs, dst_addrs, flags, private)

    def transfer_with_insert(
        self,
        instance: int,
        tokens: Tokens,
        src_addrs: np.ndarray,
        dst_addrs: np.ndarray | None = None,
        *,
        flags: TransferOptions = PLAIN,
        private: bytes = b"",
    ) -> Ticket:
        """As `transfer`, of the KV of `tokens`: what the other index holds already is not sent, and it gets the rest,
        in use there until the Arrival is settled. With `dst_addrs` everything is sent, since nobody is asked first.

        Raises as `transfer`, and ValueError for a number of blocks that does not fit the tokens.
        """
        return self._start(instance, as_tokens(tokens), src_addrs, dst_addrs, replace(flags, insert=True), private)

    def _start(
        self,
        instance: int,
        tokens: np.ndarray,
        src_addrs: np.ndarray,
        dst_addrs: np.ndarray | None,
        flags: TransferOptions,
        private: bytes,
    ) -> Ticket:
        blocks, peer = self.resolve(src_addrs), self._peer(instance)
        target = None if dst_addrs is None else as_addrs(dst_addrs)
        return self.transfers.start(peer, tokens, blocks, flags, private, self._now_ns, addrs=target)

    def _peer(self, instance: int) -> int:
        """Raises ValueError for an instance that the transport does not know."""
        if not self.transfers.knows(peer := count_of(instance, "instance")):
            raise ValueError(f"instance={instance}: expected one that is connected to this pool, {self.incarnation}")
        return peer

    def poll(self, now_ns: int) -> list[Ticket]:
        """Sets the time of the calls that follow, in ns; returns the tickets that have ended since the last call."""
        self._now_ns = now_ns = count_of(now_ns, "now_ns")
        self.blocks.poll(now_ns)
        swapped = self._swaps.drain_ended()
        return swapped if self._transfers is None else swapped + self._transfers.poll(now_ns)

    def addresses(self, blocks: np.ndarray) -> np.ndarray:
        """The present addresses, int64 [n], of block numbers (int [n]). Raises ValueError for others than there are."""
        return self._book.addresses(as_blocks(blocks, len(self.blocks.allocator.refcounts)))

    def resolve(self, addrs: np.ndarray) -> np.ndarray:
        """Block numbers, int32 [n], of addresses (int64 [n]). Raises StaleAddress, naming the first bad one."""
        return self._book.resolve(addrs)

    def explain(self, addr: int) -> BlockStory:
        """Who holds the block of an address, and which tokens it caches; a free or stale one is named as such."""
        return explain(addr, self.blocks, self._book)

    def describe(self) -> str:
        """What fits, in one line: `4096 blocks of 16 tokens = 65,536 tokens, 1.41 GiB in HBM; 0 in DRAM`."""
        return what_fits(self.geometry, self.arena.num_blocks, self.dram.num_blocks)

    def follow(self) -> IndexSnapshot:
        """What the index holds now; from the first call on `drain_events` has its changes. For an IndexFollower."""
        return self.blocks.follow()

    def drain_events(self) -> list[IndexEvent]:
        """The index's changes since the last call, oldest first; none unless somebody follows."""
        return self.blocks.drain_events()

    def stats(self) -> PoolStats:
        return self.blocks.stats()

    def check(self) -> None:
        """Raises BrokenInvariant unless allocator, ledger and index agree."""
        self.blocks.check()
