"""RadixTree: a path-compressed tree over whole blocks of tokens. Knows keys and what lies at them; nothing of eviction.

An edge is a run of blocks; a node's children are found by the bytes of their first block, and an edge is compared with
one memcmp. RadixIndex keeps block numbers at its nodes, IndexFollower the medium of each block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

NO_BLOCKS = np.empty(0, dtype=np.int32)


class RadixNode:
    """`key`: the edge's tokens as int32 bytes. `blocks`: int [len(key) / block_bytes]. The rest is in `Evictable`."""

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

    @property
    def num_tokens_end(self) -> int:
        return self.num_tokens_before + len(self.key) // 4

    def path(self) -> bytes:
        """The tokens from the root to this node's end."""
        keys, node = [self.key], self.parent
        while node is not None:
            keys.append(node.key)
            node = node.parent
        return b"".join(reversed(keys))


class Walk(NamedTuple):
    """How far a prompt is in the tree: whole `nodes`, `num_bytes` long, then the first `shared` bytes of `inside`."""

    nodes: list[RadixNode]
    num_bytes: int
    inside: RadixNode | None
    shared: int


class RadixTree:
    """Nodes under a root that has no key."""

    def __init__(self, block_size: int) -> None:
        self.block_bytes = 4 * block_size
        self.root = RadixNode(b"", NO_BLOCKS, None, 0)

    def walk(self, data: bytes, end: int) -> Walk:
        """Follows data[:end] (whole blocks of int32 bytes) as far as it goes; changes nothing."""
        node, pos, step = self.root, 0, self.block_bytes
        nodes: list[RadixNode] = []
        while pos < end and (child := node.children.get(data[pos : pos + step])) is not None:
            key = child.key
            if pos + len(key) > end or not data.startswith(key, pos):
                return Walk(nodes, pos, child, self._shared_bytes(key, data, pos, end))
            nodes.append(child)
            pos += len(key)
            node = child
        return Walk(nodes, pos, None, 0)

    def _shared_bytes(self, key: bytes, data: bytes, pos: int, end: int) -> int:
        """Bytes of whole blocks that `key` and data[pos:end] have in common: one at least, found by bisection."""
        step = self.block_bytes
        same, most = 1, min(len(key), end - pos) // step
        while same < most:
            middle = (same + most + 1) // 2
            if data.startswith(key[same * step : middle * step], pos + same * step):
                same = middle
            else:
                most = middle - 1
        return same * step

    def grow(self, parent: RadixNode, key: bytes, blocks: np.ndarray, born: int) -> RadixNode:
        """A new leaf below `parent`, which has no child that begins with the same block."""
        leaf = RadixNode(key, blocks, parent, born)
        parent.children[key[: self.block_bytes]] = leaf
        return leaf

    def split(self, node: RadixNode, head_bytes: int) -> RadixNode:
        """Cuts a node's edge; returns the new upper half. The lower half keeps its children, age and heap entry."""
        step, parent = self.block_bytes, node.parent
        num_head = head_bytes // step
        assert parent is not None and 0 < num_head < len(node.blocks)
        head = self.grow(parent, node.key[:head_bytes], node.blocks[:num_head].copy(), node.born)
        head.last_used, head.num_uses = node.last_used, node.num_uses
        node.key, node.blocks, node.parent = node.key[head_bytes:], node.blocks[num_head:].copy(), head
        node.num_tokens_before += head_bytes // 4
        head.children[node.key[:step]] = node
        return head

    def trim(self, leaf: RadixNode, num_blocks: int) -> None:
        """Cuts blocks off a leaf's tail. One left empty keeps its key, by which its parent knows it, until removed."""
        keep = len(leaf.blocks) - num_blocks
        leaf.blocks = leaf.blocks[:keep]
        if keep:
            leaf.key = leaf.key[: keep * self.block_bytes]

    def remove(self, node: RadixNode) -> RadixNode:
        """Takes a node out, and so all below it; returns its parent."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.key[: self.block_bytes]]
        return parent

    def iter_prefixes(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every maximal path: (tokens int32 [n * block_size], blocks int [n])."""
        stack = [(self.root, b"", NO_BLOCKS)]
        while stack:
            node, key, blocks = stack.pop()
            key, blocks = key + node.key, np.concatenate([blocks, node.blocks])
            if not node.children and len(blocks):
                yield np.frombuffer(key, dtype=np.int32), blocks
            stack.extend((child, key, blocks) for child in node.children.values())


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
