"""The KV cache: MemPool, its allocator, layouts and token-prefix index. Usable alone, in an engine of your own."""

from memserve.kvcache.address import Medium, Placement
from memserve.kvcache.allocator import INDEX, Allocator, Holder
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.copy_engine import AtOnce, BlockCopier, Copy, CopyEngine, InVirtualTime, NothingToCopy, OnAThread
from memserve.kvcache.errors import BrokenInvariant, MissedEvents, NotHeld, OutOfBlocks, StaleAddress
from memserve.kvcache.events import EventKind, IndexEvent, IndexSnapshot
from memserve.kvcache.eviction import FIFO, LFU, LRU, CostAware, Eviction
from memserve.kvcache.hash_index import HashIndex
from memserve.kvcache.index import Index, Match, NullIndex
from memserve.kvcache.index_follower import IndexFollower
from memserve.kvcache.inspect import BlockStory
from memserve.kvcache.layout import AggregatedLayout, CacheGeometry, DiscreteLayout, Layout
from memserve.kvcache.mempool import AddressMatch, MemPool
from memserve.kvcache.pool_stats import PoolStats
from memserve.kvcache.radix import RadixIndex
from memserve.kvcache.radix_tree import RadixNode
from memserve.kvcache.ticket import Ticket, TicketState, Timeouts, TransferOptions

__all__ = [
    "FIFO",
    "INDEX",
    "LFU",
    "LRU",
    "AddressMatch",
    "AggregatedLayout",
    "Allocator",
    "AtOnce",
    "BlockCopier",
    "BlockPool",
    "BlockStory",
    "BrokenInvariant",
    "CacheGeometry",
    "Copy",
    "CopyEngine",
    "CostAware",
    "DiscreteLayout",
    "EventKind",
    "Eviction",
    "HashIndex",
    "Holder",
    "InVirtualTime",
    "Index",
    "IndexEvent",
    "IndexFollower",
    "IndexSnapshot",
    "Layout",
    "Match",
    "Medium",
    "MemPool",
    "MissedEvents",
    "NotHeld",
    "NothingToCopy",
    "NullIndex",
    "OnAThread",
    "OutOfBlocks",
    "Placement",
    "PoolStats",
    "RadixIndex",
    "RadixNode",
    "StaleAddress",
    "Ticket",
    "TicketState",
    "Timeouts",
    "TransferOptions",
]
