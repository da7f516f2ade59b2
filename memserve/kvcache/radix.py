"""RadixIndex: the local index as a radix tree over whole blocks of tokens (section 4.2, after SGLang's).

The tree itself is radix_tree.py; here is who goes first. Evicting walks no tree: leaves wait in a heap by the eviction
policy's key and are trimmed from their tail, so exactly as many blocks go as were asked for.

A node's life: born a leaf by `insert` -> split when a request diverges inside its edge, or uses only its head ->
inner node while it has children -> leaf again -> trimmed from the tail by `evict`, removed when empty.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from memserve.kvcache.address import Medium
from memserve.kvcache.eviction import LRU, DeepestFirst, Eviction
from memserve.kvcache.eviction_queue import EvictionQueue
from memserve.kvcache.index import Index, Match, require_block_size
from memserve.kvcache.radix_tree import NO_BLOCKS, RadixNode, RadixTree, blocks_of, subtree


class RadixIndex(Index):
    """Longest-prefix index over blocks in any medium.

    refcounts: the allocator's int32 [all blocks], read to know what may be evicted.  num_hbm_blocks: blocks from this
    number on lie in DRAM; None: there is no DRAM.
    """

    moves_blocks = ranks_blocks = True

    def __init__(
        self,
        block_size: int,
        refcounts: np.ndarray,
        eviction: Eviction | None = None,
        num_hbm_blocks: int | None = None,
    ) -> None:
        self._block_size = require_block_size(block_size)
        self._refcounts = refcounts
        self._num_hbm_blocks = len(refcounts) if num_hbm_blocks is None else num_hbm_blocks
        self._is_tiered = self._num_hbm_blocks < len(refcounts)
        self._eviction = eviction or LRU()
        self._reset()

    def _reset(self) -> None:
        self._tree = RadixTree(self._block_size)
        self._leaves: EvictionQueue[RadixNode] = EvictionQueue(self._eviction, self._refcounts, bit=1)
        deepest_first = DeepestFirst(self._eviction)
        self._in_hbm: EvictionQueue[RadixNode] = EvictionQueue(deepest_first, self._refcounts, bit=2)
        self._node_of: dict[int, RadixNode] = {}  # of every block; this and the queue are kept with a DRAM only
        self._num_operations = 0
        self._num_blocks = 0

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    def match(self, tokens: np.ndarray, limit: int | None = None) -> Match:
        nodes, num_tokens = self._use(tokens, self._whole_blocks(tokens, limit))
        return Match(blocks_of(nodes), num_tokens)

    def peek(self, tokens: np.ndarray, limit: int | None = None) -> Match:
        nodes, num_tokens, inside, shared = self._tree.walk(tokens, self._whole_blocks(tokens, limit))
        blocks = blocks_of(nodes)
        if inside is not None:
            blocks = np.concatenate([blocks, inside.blocks[: shared // self._block_size]])
        return Match(blocks, num_tokens + shared)

    def insert(self, tokens: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        if len(tokens) != len(blocks) * self._block_size:
            raise ValueError(
                f"{len(tokens)} tokens for {len(blocks)} blocks: expected exactly {self._block_size} tokens a block"
            )
        nodes, num_tokens = self._touch(tokens, len(tokens))
        if num_tokens < len(tokens):
            new = np.array(blocks[num_tokens // self._block_size :], dtype=np.int32)
            leaf = self._grow(nodes, tokens[num_tokens:].copy(), new)
            self._num_blocks += len(new)
            self._leaves.offer(leaf)
            if self._is_tiered:
                self._place(leaf, new)
            self.log.inserted(leaf, new)
        return blocks_of(nodes)

    def delete(self, tokens: np.ndarray) -> np.ndarray:
        end = self._whole_blocks(tokens, None)
        nodes, num_tokens = self._use(tokens, end)
        never_cached = num_tokens < end and nodes and nodes[-1].children
        if not nodes or never_cached:
            return NO_BLOCKS
        start = nodes.pop()
        while nodes and len(nodes[-1].children) == 1:
            start = nodes.pop()
        below = list(subtree(start))
        gone = blocks_of(below)
        for node in reversed(below):
            self.log.removed(node, node.blocks)
        self._remove(start)
        self._forget(gone)
        return gone

    def evict(self, num_blocks: int, medium: Medium | None = None) -> np.ndarray:
        freed: list[np.ndarray] = []
        kept: list[RadixNode] = []
        missing = num_blocks
        self._leaves.unpark()
        while missing > 0 and (leaf := self._next_leaf()) is not None:
            count = self._num_evictable(leaf, missing, medium)
            cut = leaf.blocks[len(leaf.blocks) - count :]
            if count:
                self.log.removed(leaf, cut)
                freed.append(cut[::-1])
            missing -= count
            if count == len(leaf.blocks):
                self._remove(leaf)
                continue
            self._tree.trim(leaf, count)
            if self._refcounts[leaf.blocks[-1]] > 1:
                self._leaves.park(leaf, leaf.blocks[-1:])
            elif missing:
                kept.append(leaf)
            else:  # however many are asked for at once, the same go
                self._leaves.put_back(leaf)
        for leaf in kept:
            self._leaves.offer(leaf)
        gone = _joined(freed)
        self._forget(gone)
        return gone

    def coldest(self, num_blocks: int) -> np.ndarray:
        found: list[np.ndarray] = []
        kept: list[RadixNode] = []
        missing = num_blocks
        self._in_hbm.unpark()
        while missing > 0 and (node := self._in_hbm.pop()) is not None:
            if node.parent is None:
                continue
            in_hbm = node.blocks[node.blocks < self._num_hbm_blocks]
            movable = in_hbm[self._refcounts[in_hbm] == 1][-missing:]
            if len(movable):  # whether those go in the end is not known here
                kept.append(node)
                found.append(movable[::-1])
                missing -= len(movable)
            elif len(in_hbm):
                self._in_hbm.park(node, in_hbm)
        for node in kept:
            self._in_hbm.offer(node)
        return _joined(found)

    def uses(self, tokens: np.ndarray) -> np.ndarray:
        nodes, _, inside, shared = self._tree.walk(tokens, self._whole_blocks(tokens, None))
        num_uses, num_blocks = [n.num_uses for n in nodes], [len(n.blocks) for n in nodes]
        if inside is not None:
            num_uses, num_blocks = [*num_uses, inside.num_uses], [*num_blocks, shared // self._block_size]
        return np.repeat(np.array(num_uses, dtype=np.int64), num_blocks)

    def next_out(self, num_blocks: int, known: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        seen: list[RadixNode] = []
        num_gone: Counter[RadixNode] = Counter()  # children that would be gone
        found, missing = None, num_blocks
        self._leaves.unpark()
        while missing > 0 and found is None and (node := self._leaves.pop()) is not None:
            parent = node.parent
            if parent is None or len(node.children) > num_gone[node]:
                continue
            seen.append(node)
            count = self._num_evictable(node, missing, None)
            if count and not known[node.blocks[-1]]:
                found = node
            missing -= count
            num_gone[parent] += count == len(node.blocks)
            if num_gone[parent] == len(parent.children) and parent is not self._tree.root:
                self._leaves.offer(parent)
        for node in seen:
            if not node.children:
                self._leaves.offer(node)
        return None if found is None else found.prefix()

    def repoint(self, blocks: np.ndarray, moved_to: np.ndarray) -> None:
        order = blocks.argsort()
        old, new = blocks[order], moved_to[order]
        for node in {id(n): n for n in (self._node_of.pop(b) for b in old.tolist())}.values():
            before = node.blocks
            place = np.minimum(old.searchsorted(before), len(old) - 1)
            moved = old[place] == before
            node.blocks = np.where(moved, new[place], before)
            self._place(node, node.blocks[moved])
            self._leaves.reoffer(node)
            self.log.moved(node, before, node.blocks)

    def clear(self) -> np.ndarray:
        gone = blocks_of(list(subtree(self._tree.root)))
        self._reset()
        self.log.cleared()
        return gone

    def iter_prefixes(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        leaves = sorted(self._tree.leaves(), key=self._eviction.key, reverse=True)
        return (leaf.prefix() for leaf in leaves)

    def _whole_blocks(self, tokens: np.ndarray, limit: int | None) -> int:
        """How many of the tokens are in whole blocks within the limit."""
        length = len(tokens) if limit is None else min(len(tokens), limit)
        return length - length % self._block_size

    def _use(self, tokens: np.ndarray, end: int) -> tuple[list[RadixNode], int]:
        """As `_touch`, for who looks tokens up: counted as a use."""
        nodes, num_tokens = self._touch(tokens, end)
        for node in nodes:
            node.num_uses += 1
        return nodes, num_tokens

    def _touch(self, tokens: np.ndarray, end: int) -> tuple[list[RadixNode], int]:
        """The nodes of the longest cached prefix of tokens[:end], the youngest of all now, and its length.

        An edge of which only the head is used is split, so that its tail keeps its age.
        """
        self._num_operations += 1
        nodes, num_tokens, inside, shared = self._tree.walk(tokens, end)
        if inside is not None:
            nodes.append(self._tree.split(inside, shared))
            if self._is_tiered:
                self._place(nodes[-1], nodes[-1].blocks)
        for node in nodes:
            node.last_used = self._num_operations
        if nodes and not nodes[-1].children:
            self._leaves.offer(nodes[-1])
        return nodes, num_tokens + shared

    def _grow(self, nodes: list[RadixNode], tokens: np.ndarray, blocks: np.ndarray) -> RadixNode:
        """The leaf that holds new `blocks` at the end of a path, to which it is added.

        Where nothing tells it from the leaf that it continues, that one becomes longer: a request that enters its
        blocks as they fill makes one node, not a chain of them.
        """
        above = nodes[-1] if nodes else self._tree.root
        was_leaf = bool(nodes) and not above.children
        leaf = self._tree.grow(above, tokens, blocks, self._num_operations)
        same = was_leaf and (not self.counts_apart or above.num_uses == leaf.num_uses)
        if same and self._eviction.key(above) == self._eviction.key(leaf):
            self._tree.join(above)
            self._leaves.reoffer(above)
            return above
        nodes.append(leaf)
        return leaf

    def _place(self, node: RadixNode, blocks: np.ndarray) -> None:
        """Notes that `blocks` are found at a node, and that some of them may be moved to DRAM."""
        self._node_of.update(dict.fromkeys(blocks.tolist(), node))
        self._in_hbm.reoffer(node)
        self._in_hbm.offer(node)

    def _forget(self, blocks: np.ndarray) -> None:
        """Counts blocks that have left the tree."""
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

    def _num_evictable(self, leaf: RadixNode, most: int, medium: Medium | None) -> int:
        """How many of the leaf's last `most` blocks nobody else holds, from its end on; of a medium, if it is named."""
        tail = leaf.blocks[-most:]
        stays = self._refcounts.take(tail) > 1
        if medium is not None:
            stays |= (tail >= self._num_hbm_blocks) != bool(medium)
        (kept,) = stays.nonzero()
        return len(tail) - 1 - int(kept[-1]) if len(kept) else len(tail)

    def _remove(self, node: RadixNode) -> None:
        """Takes a node and all below it out of the tree; their heap entries are dropped when they come up."""
        parent = self._tree.remove(node)
        for gone in list(subtree(node)) if node.children else (node,):
            gone.parent = None
            if gone.queued:
                self._leaves.forget(gone)
                self._in_hbm.forget(gone)
        if parent is not self._tree.root and not parent.children:
            self._leaves.offer(parent)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else NO_BLOCKS
