"""RadixTree: a path-compressed tree over whole blocks of tokens. Knows edges and what lies at them, not eviction.

An edge is a run of blocks; a node's children are found by the bytes of their first block, and the rest of an edge is
compared at once. A node that is split leaves both halves as views of the same memory, so splitting copies no tokens;
they take copies of their own once less than half of it is in use. RadixIndex keeps block numbers at its nodes,
IndexFollower the medium of each block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

NO_BLOCKS = np.empty(0, dtype=np.int32)
_SHORT = 1024  # tokens; up to here a copy to bytes and a memcmp take less than comparing the arrays
_NO_TOKENS = np.empty(0, dtype=np.int32)


class RadixNode:
    """`tokens`: the edge to it, int32 [n * block_size]. `blocks`: int [n], of those. The rest is in `Evictable`."""

    __slots__ = (
        "blocks", "born", "children", "last_used", "num_tokens_before", "num_uses", "parent", "queued", "tokens",
    )  # fmt: skip

    def __init__(
        self, tokens: np.ndarray, blocks: np.ndarray, parent: "RadixNode | None", num_tokens_before: int, born: int
    ) -> None:
        self.tokens = tokens
        self.blocks = blocks
        self.parent = parent
        self.children: dict[bytes, RadixNode] = {}
        self.born = self.last_used = born
        self.num_uses = 1
        self.num_tokens_before = num_tokens_before
        self.queued = 0

    @property
    def num_tokens_end(self) -> int:
        return self.num_tokens_before + len(self.tokens)

    def path(self) -> bytes:
        """The tokens from the root to this node's end, as int32 bytes."""
        return b"".join(node.tokens.tobytes() for node in self._from_root())

    def prefix(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, blocks) from the root to this node's end: int32 [n * block_size], int [n]."""
        nodes = self._from_root()
        return np.concatenate([node.tokens for node in nodes]), blocks_of(nodes)

    def _from_root(self) -> "list[RadixNode]":
        """The nodes that lead here, and this one."""
        nodes = [self]
        while (node := nodes[-1].parent) is not None:
            nodes.append(node)
        return nodes[::-1]


class Walk(NamedTuple):
    """How far a prompt is in the tree: whole `nodes`, `num_tokens` long, then the first `shared` tokens of `inside`."""

    nodes: list[RadixNode]
    num_tokens: int
    inside: RadixNode | None
    shared: int


class RadixTree:
    """Nodes under a root that has no tokens."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.root = RadixNode(_NO_TOKENS, NO_BLOCKS, None, 0, 0)
        self._differs = np.empty(0, dtype=bool)  # scratch: new pages would cost more than the comparison

    def walk(self, tokens: np.ndarray, end: int) -> Walk:
        """Follows tokens[:end] (int32, whole blocks) as far as it goes; changes nothing."""
        node, pos, size = self.root, 0, self.block_size
        nodes: list[RadixNode] = []
        while pos < end and (child := node.children.get(tokens[pos : pos + size].tobytes())) is not None:
            edge = child.tokens
            stop = min(end, pos + len(edge))
            shared = self._num_shared(tokens[pos:stop], edge[: stop - pos])
            if shared < len(edge):
                return Walk(nodes, pos, child, shared - shared % size)
            nodes.append(child)
            node, pos = child, stop
        return Walk(nodes, pos, None, 0)

    def grow(self, parent: RadixNode, tokens: np.ndarray, blocks: np.ndarray, born: int) -> RadixNode:
        """A new leaf below `parent`, which has no child that begins with the same block. Keeps both arrays."""
        leaf = RadixNode(tokens, blocks, parent, parent.num_tokens_end, born)
        parent.children[self._first_block(leaf)] = leaf
        return leaf

    def split(self, node: RadixNode, num_tokens: int) -> RadixNode:
        """Cuts a node's edge; returns the new upper half. The lower half keeps its children, age and heap entry."""
        parent, num_blocks = node.parent, num_tokens // self.block_size
        assert parent is not None and 0 < num_blocks < len(node.blocks)
        head = RadixNode(node.tokens[:num_tokens], node.blocks[:num_blocks], parent, node.num_tokens_before, node.born)
        head.last_used, head.num_uses = node.last_used, node.num_uses
        parent.children[self._first_block(head)] = head
        node.tokens, node.blocks, node.parent = node.tokens[num_tokens:], node.blocks[num_blocks:], head
        node.num_tokens_before += num_tokens
        head.children[self._first_block(node)] = node
        return head

    def join(self, node: RadixNode) -> None:
        """Makes a node and its only child, a leaf, one: the child's edge and blocks become the end of the node's."""
        (leaf,) = node.children.values()
        assert node.parent is not None and not leaf.children
        memory, node.children = _memory(node), {}
        node.tokens = np.concatenate([node.tokens, leaf.tokens])
        node.blocks = np.concatenate([node.blocks, leaf.blocks])
        if _memory(node.parent) is memory:
            _tighten(node.parent)

    def trim(self, leaf: RadixNode, num_blocks: int) -> None:
        """Cuts blocks off a leaf's tail. One left empty keeps tokens, by which its parent knows it, until removed."""
        keep = len(leaf.blocks) - num_blocks
        leaf.blocks = leaf.blocks[:keep]
        if keep and num_blocks:
            leaf.tokens = leaf.tokens[: keep * self.block_size]
            _tighten(leaf)

    def remove(self, node: RadixNode) -> RadixNode:
        """Takes a node out, and so all below it; returns its parent."""
        parent = node.parent
        assert parent is not None
        del parent.children[self._first_block(node)]
        if _memory(parent) is _memory(node):
            _tighten(parent)
        return parent

    def iter_prefixes(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every maximal path, in no order: (tokens int32 [n * block_size], blocks int [n])."""
        return (leaf.prefix() for leaf in self.leaves())

    def leaves(self) -> Iterator[RadixNode]:
        """The nodes that nothing continues, in no order."""
        return (node for node in subtree(self.root) if not node.children and node is not self.root)

    def _num_shared(self, wanted: np.ndarray, found: np.ndarray) -> int:
        """Leading tokens that two arrays of one length have in common."""
        length = len(wanted)
        if length <= _SHORT and wanted.tobytes() == found.tobytes():
            return length
        if length > len(self._differs):
            self._differs = np.empty(2 * length, dtype=bool)
        differs = np.not_equal(wanted, found, out=self._differs[:length])
        first = int(differs.argmax())
        return first if differs[first] else length

    def _first_block(self, node: RadixNode) -> bytes:
        return node.tokens[: self.block_size].tobytes()


def _memory(node: RadixNode) -> np.ndarray:
    """The array that owns the memory of a node's tokens."""
    base: np.ndarray | None = node.tokens.base
    return node.tokens if base is None else base


def _tighten(lowest: RadixNode) -> None:
    """Ends the sharing of memory of which the nodes that are left, `lowest` and those above it, use less than half."""
    memory, num_used = _memory(lowest), 0
    if 2 * len(lowest.tokens) >= len(memory):
        return
    sharers: list[RadixNode] = []
    node: RadixNode | None = lowest
    while node is not None and _memory(node) is memory:
        sharers.append(node)
        num_used += len(node.tokens)
        node = node.parent
    if 2 * num_used < len(memory):
        for sharer in sharers:
            sharer.tokens, sharer.blocks = sharer.tokens.copy(), sharer.blocks.copy()


def subtree(node: RadixNode) -> Iterator[RadixNode]:
    """A node and all below it, each before what it leads to."""
    stack = [node]
    while stack:
        top = stack.pop()
        yield top
        stack.extend(top.children.values())


def blocks_of(nodes: list[RadixNode]) -> np.ndarray:
    """Their blocks, one node after the other; of a single node its own array."""
    if len(nodes) == 1:
        return nodes[0].blocks
    return np.concatenate([node.blocks for node in nodes]) if nodes else NO_BLOCKS
