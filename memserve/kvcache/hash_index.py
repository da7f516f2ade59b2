"""HashIndex: the baseline of Fig. 10, as vLLM 0.4.0 had it: a dict from the hash of a whole prefix to its last block.

Every block's key is a digest of all the tokens before and in it, computed anew from the first token: quadratic in the
prompt on purpose. The paper compares its radix tree with this; RadixIndex is what to use. Knows nothing of pools.

An entry's life: born a leaf by `insert` -> inner while a continuation of it is cached -> leaf again -> gone by `evict`.
A leaf waits in a heap by the eviction policy's key; an entry whose key grew since is corrected when it comes up.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

from memserve.kvcache.address import Medium
from memserve.kvcache.eviction import LRU, Eviction
from memserve.kvcache.eviction_queue import EvictionQueue
from memserve.kvcache.index import Index, Match, require_block_size

_DIGEST_BYTES = 16


class HashEntry:
    """One cached block, as eviction.Evictable. `tokens`: its own, as int32 bytes. `parent`: of the block before it."""

    __slots__ = (
        "block",
        "born",
        "children",
        "digest",
        "last_used",
        "num_tokens_before",
        "num_uses",
        "parent",
        "queued",
        "tokens",
    )  # fmt: skip

    def __init__(
        self, digest: bytes, tokens: bytes, num_tokens_before: int, block: int, parent: "HashEntry | None", born: int
    ) -> None:
        self.digest = digest
        self.tokens = tokens
        self.num_tokens_before = num_tokens_before
        self.block = block
        self.parent = parent
        self.children: dict[bytes, HashEntry] = {}
        self.born = self.last_used = born
        self.num_uses = 1
        self.queued = 0
        if parent is not None:
            parent.children[digest] = self

    def prefix(self) -> list["HashEntry"]:
        """The entries from the first block of the prefix to this one."""
        entries = [self]
        while (parent := entries[-1].parent) is not None:
            entries.append(parent)
        return entries[::-1]

    def path(self) -> bytes:
        """The tokens from the first block of the prefix to this one's end."""
        return b"".join(entry.tokens for entry in self.prefix())

    @property
    def num_tokens_end(self) -> int:
        return self.num_tokens_before + len(self.tokens) // 4

    def use(self, now: int) -> None:
        self.last_used = now
        self.num_uses += 1


class HashIndex(Index):
    """Digest of each whole prefix -> block. Offers no block to be moved; follows those that their holders move.

    refcounts, num_hbm_blocks: as of RadixIndex.
    """

    def __init__(
        self,
        block_size: int,
        refcounts: np.ndarray,
        eviction: Eviction | None = None,
        num_hbm_blocks: int | None = None,
    ) -> None:
        self._block_size = require_block_size(block_size)
        self._block_bytes = 4 * block_size
        self._refcounts = refcounts
        self._num_hbm_blocks = len(refcounts) if num_hbm_blocks is None else num_hbm_blocks
        self._eviction = eviction or LRU()
        self._reset()

    def _reset(self) -> None:
        self._entries: dict[bytes, HashEntry] = {}
        self._entry_of: dict[int, HashEntry] = {}  # by block
        self._leaves: EvictionQueue[HashEntry] = EvictionQueue(self._eviction, self._refcounts)
        self._num_operations = 0

    @property
    def num_blocks(self) -> int:
        return len(self._entries)

    def match(self, tokens: np.ndarray, limit: int | None = None) -> Match:
        self._num_operations += 1
        path = self._find(tokens, limit)
        for entry in path:
            entry.use(self._num_operations)
        return Match(_blocks_of(path), len(path) * self._block_size)

    def peek(self, tokens: np.ndarray, limit: int | None = None) -> Match:
        path = self._find(tokens, limit)
        return Match(_blocks_of(path), len(path) * self._block_size)

    def insert(self, tokens: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        if len(tokens) != len(blocks) * self._block_size:
            raise ValueError(
                f"{len(tokens)} tokens for {len(blocks)} blocks: expected exactly {self._block_size} tokens a block"
            )
        self._num_operations += 1
        data, parent = tokens.tobytes(), None
        path: list[HashEntry] = []
        new: list[int] = []
        for digest, block in zip(self._digests(data, len(tokens)), blocks.tolist(), strict=True):
            entry = self._entries.get(digest)
            if entry is None:
                start = len(path) * self._block_bytes
                own = data[start : start + self._block_bytes]
                entry = HashEntry(digest, own, start // 4, block, parent, self._num_operations)
                self._entries[digest] = self._entry_of[block] = entry
                new.append(block)
            else:
                entry.last_used = self._num_operations
            path.append(entry)
            parent = entry
        if parent is not None and not parent.children:
            self._leaves.offer(parent)
        if new:
            self.log.inserted(path[-1], new)
        return _blocks_of(path)

    def delete(self, tokens: np.ndarray) -> np.ndarray:
        self.match(tokens)
        path = self._find(tokens, None)
        never_cached = len(path) < len(tokens) // self._block_size and path and path[-1].children
        if not path or never_cached:
            return _blocks_of([])
        start = path[-1]
        while start.parent is not None and len(start.parent.children) == 1:
            start = start.parent
        gone = list(_subtree(start))
        for entry in reversed(gone):
            self._remove(entry)
        return _blocks_of(gone)

    def evict(self, num_blocks: int, medium: Medium | None = None) -> np.ndarray:
        gone: list[HashEntry] = []
        elsewhere: list[HashEntry] = []
        self._leaves.unpark()
        while len(gone) < num_blocks and (leaf := self._next_leaf()) is not None:
            if self._refcounts[leaf.block] > 1:
                self._leaves.park(leaf, _blocks_of([leaf]))
            elif medium not in (None, self._medium_of(leaf)):
                elsewhere.append(leaf)
            else:
                self._remove(leaf)
                gone.append(leaf)
        for leaf in elsewhere:
            self._leaves.offer(leaf)
        return _blocks_of(gone)

    def repoint(self, blocks: np.ndarray, moved_to: np.ndarray) -> None:
        entries = [self._entry_of.pop(block) for block in blocks.tolist()]
        for entry, block in zip(entries, moved_to.tolist(), strict=True):
            before, entry.block = entry.block, block
            self._entry_of[block] = entry
            self._leaves.reoffer(entry)
            self.log.moved(entry, np.array([before]), np.array([block]))

    def clear(self) -> np.ndarray:
        gone = _blocks_of(list(self._entries.values()))
        self._reset()
        self.log.cleared()
        return gone

    def iter_prefixes(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        leaves = [entry for entry in self._entries.values() if not entry.children]
        for leaf in sorted(leaves, key=self._eviction.key, reverse=True):
            yield np.frombuffer(leaf.path(), dtype=np.int32), _blocks_of(leaf.prefix())

    def _find(self, tokens: np.ndarray, limit: int | None) -> list[HashEntry]:
        """The entries of the longest cached prefix of tokens[:limit]."""
        path: list[HashEntry] = []
        length = len(tokens) if limit is None else min(len(tokens), limit)
        for digest in self._digests(tokens.tobytes(), length):
            if (entry := self._entries.get(digest)) is None:
                break
            path.append(entry)
        return path

    def _digests(self, data: bytes, num_tokens: int) -> Iterator[bytes]:
        """For each whole block of data's first tokens: the digest of everything up to its end."""
        view = memoryview(data)
        for end in range(self._block_bytes, 4 * num_tokens + 1, self._block_bytes):
            yield hashlib.blake2b(view[:end], digest_size=_DIGEST_BYTES).digest()

    def _next_leaf(self) -> HashEntry | None:
        """Takes the leaf that goes first out of the queue."""
        while (entry := self._leaves.pop()) is not None:
            if not entry.children and self._entries.get(entry.digest) is entry:
                return entry
        return None

    def _medium_of(self, entry: HashEntry) -> Medium:
        return Medium.DRAM if entry.block >= self._num_hbm_blocks else Medium.HBM

    def _remove(self, entry: HashEntry) -> None:
        """Forgets an entry. Its parent, when that became a leaf, can go next."""
        self.log.removed(entry, [entry.block])
        del self._entries[entry.digest], self._entry_of[entry.block]
        self._leaves.forget(entry)
        if entry.parent is not None:
            del entry.parent.children[entry.digest]
            if not entry.parent.children and entry.parent.digest in self._entries:
                self._leaves.offer(entry.parent)


def _subtree(entry: HashEntry) -> Iterator[HashEntry]:
    stack = [entry]
    while stack:
        top = stack.pop()
        yield top
        stack.extend(top.children.values())


def _blocks_of(entries: list[HashEntry]) -> np.ndarray:
    return np.array([entry.block for entry in entries], dtype=np.int32)
