"""RadixIndex: a path-compressed tree over whole blocks of tokens (section 4.2, after SGLang's radix tree).

An edge is a run of blocks; a node's children are found by the bytes of their first block, and an edge is compared with
one memcmp. Evicting walks no tree: leaves wait in a heap by the eviction policy's key and are trimmed from their tail,
so exactly as many blocks go as were asked for.

A node's life: born a leaf by `insert` -> split when a request diverges inside its edge, or uses only its head ->
inner node while it has children -> leaf again -> trimmed from the tail by `evict`, removed when empty.
"""

from collections.abc import Iterator

import numpy as np

from memserve.kvcache.eviction import LRU, DeepestFirst, Eviction
from memserve.kvcache.eviction_queue import EvictionQueue
from memserve.kvcache.index import Index, Match

_NO_BLOCKS = np.empty(0, dtype=np.int32)


class RadixNode:
    """`key`: the edge's tokens as int32 bytes. `blocks`: int32 [len(key) / block_bytes]. The rest is in `Evictable`."""

    __slots__ = (
        "blocks", "born", "children", "key", "last_used", "num_tokens_before", "num_uses", "parent", "queued",
    )  # fmt: skip

    def __init__(self, key: bytes, blocks: np.ndarray, parent: "RadixNode | None", born: int) -> None:
        self.key = key
        self.blocks = blocks
        self.parent = parent
        self.children: dict[bytes, RadixNode] = {}
        self.born = self.last_used = born
        self.num_uses = 1
        self.num_tokens_before: int = 0 if parent is None else parent.num_tokens_before + len(parent.key) // 4
        self.queued = 0


class RadixIndex(Index):
    """Longest-prefix index over blocks in any medium.

    refcounts: the allocator's int32 [all blocks], read to know what may be evicted.  num_hbm_blocks: blocks from this
    number on lie in DRAM; None: there is no DRAM.
    """

    def __init__(
        self,
        block_size: int,
        refcounts: np.ndarray,
        eviction: Eviction | None = None,
        num_hbm_blocks: int | None = None,
    ) -> None:
        self._block_size = block_size
        self._block_bytes = 4 * block_size
        self._refcounts = refcounts
        self._num_hbm_blocks = len(refcounts) if num_hbm_blocks is None else num_hbm_blocks
        self._is_tiered = self._num_hbm_blocks < len(refcounts)
        self._eviction = eviction or LRU()
        self._reset()

    def _reset(self) -> None:
        self._root = RadixNode(b"", _NO_BLOCKS, None, 0)
        self._leaves: EvictionQueue[RadixNode] = EvictionQueue(self._eviction, bit=1)
        self._in_hbm: EvictionQueue[RadixNode] = EvictionQueue(DeepestFirst(self._eviction), bit=2)
        self._node_of: dict[int, RadixNode] = {}  # of every block; this and the queue are kept with a DRAM only
        self._num_operations = 0
        self._num_blocks = 0

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    def match(self, tokens: np.ndarray, limit: int | None = None) -> Match:
        self._num_operations += 1
        data, end = self._whole_blocks(tokens, limit)
        node, pos, parts = self._root, 0, []
        while pos < end and (child := node.children.get(data[pos : pos + self._block_bytes])) is not None:
            shared = self._shared_bytes(child.key, data, pos, end)
            if shared < len(child.key):
                child = self._split(child, shared)
            self._use(child)
            parts.append(child.blocks)
            node, pos = child, pos + shared
        return Match(_joined(parts), pos // 4)

    def peek(self, tokens: np.ndarray, limit: int | None = None) -> int:
        data, end = self._whole_blocks(tokens, limit)
        node, pos = self._root, 0
        while pos < end and (child := node.children.get(data[pos : pos + self._block_bytes])) is not None:
            shared = self._shared_bytes(child.key, data, pos, end)
            pos += shared
            if shared < len(child.key):
                break
            node = child
        return pos // 4

    def insert(self, tokens: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        if len(tokens) != len(blocks) * self._block_size:
            raise ValueError(
                f"{len(tokens)} tokens for {len(blocks)} blocks: expected exactly {self._block_size} tokens a block"
            )
        found = self.match(tokens)
        num_found = len(found.blocks)
        if num_found == len(blocks):
            return found.blocks
        parent = self._descend(tokens, found.num_tokens)
        key = tokens[found.num_tokens :].tobytes()
        leaf = RadixNode(key, np.array(blocks[num_found:], dtype=np.int32), parent, self._num_operations)
        parent.children[key[: self._block_bytes]] = leaf
        self._num_blocks += len(leaf.blocks)
        self._leaves.offer(leaf)
        if self._is_tiered:
            self._place(leaf)
        return np.concatenate([found.blocks, leaf.blocks])

    def delete(self, tokens: np.ndarray) -> np.ndarray:
        found = self.match(tokens)
        start = self._descend(tokens, found.num_tokens)
        never_cached = start.children and found.num_tokens < len(tokens) // self._block_size * self._block_size
        if start is self._root or never_cached:
            return _NO_BLOCKS
        while start.parent is not None and start.parent is not self._root and len(start.parent.children) == 1:
            start = start.parent
        gone = _joined([node.blocks for node in _subtree(start)])
        self._remove(start)
        self._forget(gone)
        return gone

    def evict(self, num_blocks: int) -> np.ndarray:
        freed: list[np.ndarray] = []
        in_use: list[RadixNode] = []
        missing = num_blocks
        while missing > 0 and (leaf := self._next_leaf()) is not None:
            tail = self._trim(leaf, missing)
            if not len(leaf.blocks):
                self._remove(leaf)
            elif len(tail) < missing:
                in_use.append(leaf)
            else:
                self._leaves.offer(leaf)
            freed.append(tail)
            missing -= len(tail)
        for leaf in in_use:
            self._leaves.offer(leaf)
        return _joined(freed)

    def coldest(self, num_blocks: int) -> np.ndarray:
        found: list[np.ndarray] = []
        kept: list[RadixNode] = []
        missing = num_blocks
        while missing > 0 and (node := self._in_hbm.pop()) is not None:
            if node.parent is None:
                continue
            in_hbm = node.blocks[node.blocks < self._num_hbm_blocks]
            movable = in_hbm[self._refcounts[in_hbm] == 1][-missing:]
            if len(movable) < len(in_hbm):
                kept.append(node)
            found.append(movable[::-1])
            missing -= len(movable)
        for node in kept:
            self._in_hbm.offer(node)
        return _joined(found)

    def repoint(self, blocks: np.ndarray, moved_to: np.ndarray) -> None:
        place = dict(zip(blocks.tolist(), moved_to.tolist(), strict=True))
        for node in {id(n): n for n in (self._node_of.pop(b) for b in place)}.values():
            node.blocks = np.array([place.get(b, b) for b in node.blocks.tolist()], dtype=np.int32)
            self._place(node)

    def clear(self) -> np.ndarray:
        gone = _joined([node.blocks for node in _subtree(self._root)])
        self._reset()
        return gone

    def iter_prefixes(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        stack = [(self._root, b"", _NO_BLOCKS)]
        while stack:
            node, key, blocks = stack.pop()
            key, blocks = key + node.key, np.concatenate([blocks, node.blocks])
            if not node.children and len(blocks):
                yield np.frombuffer(key, dtype=np.int32), blocks
            stack.extend((child, key, blocks) for child in node.children.values())

    def _whole_blocks(self, tokens: np.ndarray, limit: int | None) -> tuple[bytes, int]:
        """The tokens' bytes, and how many of them are in whole blocks within the limit."""
        length = len(tokens) if limit is None else min(len(tokens), limit)
        return tokens.tobytes(), length // self._block_size * self._block_bytes

    def _shared_bytes(self, key: bytes, data: bytes, pos: int, end: int) -> int:
        """Bytes of whole blocks that `key` and data[pos:end] have in common at their start."""
        length = min(len(key), end - pos)
        if length == len(key) and data.startswith(key, pos):
            return length
        a = np.frombuffer(key, dtype=np.int32, count=length // 4)
        b = np.frombuffer(data, dtype=np.int32, count=length // 4, offset=pos)
        differs = np.flatnonzero(a != b)
        same = int(differs[0]) if len(differs) else len(a)
        return same // self._block_size * self._block_bytes

    def _split(self, node: RadixNode, head_bytes: int) -> RadixNode:
        """Cuts a node's edge; returns the new upper half. The lower half keeps its children, age and heap entry."""
        num_head = head_bytes // self._block_bytes
        assert node.parent is not None and 0 < num_head < len(node.blocks)
        head = RadixNode(node.key[:head_bytes], node.blocks[:num_head].copy(), node.parent, node.born)
        head.last_used, head.num_uses = node.last_used, node.num_uses
        node.parent.children[node.key[: self._block_bytes]] = head
        node.key, node.blocks, node.parent = node.key[head_bytes:], node.blocks[num_head:].copy(), head
        node.num_tokens_before += head_bytes // 4
        head.children[node.key[: self._block_bytes]] = node
        if self._is_tiered:
            self._place(head)
        return head

    def _descend(self, tokens: np.ndarray, num_tokens: int) -> RadixNode:
        """The node at which a matched prefix ends (`match` has split it off already)."""
        data, node, pos = tokens.tobytes(), self._root, 0
        while pos < 4 * num_tokens:
            node = node.children[data[pos : pos + self._block_bytes]]
            pos += len(node.key)
        return node

    def _use(self, node: RadixNode) -> None:
        node.last_used = self._num_operations
        node.num_uses += 1
        if not node.children:
            self._leaves.offer(node)

    def _place(self, node: RadixNode) -> None:
        """Notes where a node's blocks are found, and that some of them may be moved to DRAM."""
        self._node_of.update(dict.fromkeys(node.blocks.tolist(), node))
        self._in_hbm.offer(node)

    def _forget(self, blocks: np.ndarray) -> None:
        """Counts blocks that left the tree."""
        self._num_blocks -= len(blocks)
        if self._is_tiered:
            for block in blocks.tolist():
                self._node_of.pop(block, None)

    def _next_leaf(self) -> RadixNode | None:
        """Takes the leaf that goes first out of the queue."""
        while (node := self._leaves.pop()) is not None:
            if not node.children and node.parent is not None:
                return node
        return None

    def _trim(self, leaf: RadixNode, most: int) -> np.ndarray:
        """Cuts up to `most` blocks that nobody else holds off the leaf's tail and returns them, deepest first."""
        tail = leaf.blocks[-most:]
        in_use = np.flatnonzero(self._refcounts[tail] > 1)
        count = len(tail) - (int(in_use[-1]) + 1 if len(in_use) else 0)
        if not count:
            return _NO_BLOCKS
        keep = len(leaf.blocks) - count
        cut = leaf.blocks[keep:][::-1]
        leaf.blocks = leaf.blocks[:keep].copy()
        if keep:  # an empty leaf keeps its key: its parent knows it by that
            leaf.key = leaf.key[: keep * self._block_bytes]
        self._forget(cut)
        return cut

    def _remove(self, node: RadixNode) -> None:
        """Takes a node and all below it out of the tree; their heap entries are dropped when they come up."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.key[: self._block_bytes]]
        for gone in list(_subtree(node)):
            gone.parent = None
            self._leaves.forget(gone)
            self._in_hbm.forget(gone)
        if parent is not self._root and not parent.children:
            self._leaves.offer(parent)


def _subtree(node: RadixNode) -> Iterator[RadixNode]:
    stack = [node]
    while stack:
        top = stack.pop()
        yield top
        stack.extend(top.children.values())


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else _NO_BLOCKS
