"""SharedTree: one path-compressed tree of prefixes for many instances; a node knows who holds it. Knows no policy.

    # a node: [edge: whole blocks of tokens] + holders, a set of rows kept as the bits of one integer
    # who holds a node holds every node above it, so one walk finds the cached length of all instances

kvcache/radix_tree.py is the tree of a single pool; here one prompt is matched for all instances in one walk, so what a
node carries is a set, edges are bytes (one memcmp a node) and neighbours with the same holders are joined again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

TOKEN_BYTES = 4  # little-endian int32


class HolderNode:
    """edge: int32 bytes of whole blocks.  end: bytes from the root to the edge's end.  seen: the rows that hold it, and
    when each was last seen to; holders: the same rows as bits.
    """

    __slots__ = ("children", "edge", "end", "holders", "parent", "seen")

    def __init__(self, edge: bytes, parent: "HolderNode | None", end: int) -> None:
        self.edge, self.parent, self.end = edge, parent, end
        self.children: dict[bytes, HolderNode] = {}
        self.seen: dict[int, int] = {}
        self.holders = 0


class Grown(NamedTuple):
    """nodes: that the row holds since, the highest first.  heads: upper parts of nodes that were split for it."""

    nodes: list[HolderNode]
    heads: list[HolderNode]


class SharedTree:
    """Prefixes of whole blocks (`block_size` tokens) held by `num_rows` instances. Paths are int32 bytes.

    num_blocks: held by each row, a block counted once for each.  num_nodes: of the tree.
    """

    def __init__(self, num_rows: int, block_size: int) -> None:
        self.num_rows = num_rows
        self.block_bytes = TOKEN_BYTES * block_size
        self.num_blocks = [0] * num_rows
        self.num_nodes = 0
        self._root = HolderNode(b"", None, 0)

    def add_row(self) -> None:
        """One more instance, the last row; it holds nothing yet."""
        self.num_rows += 1
        self.num_blocks.append(0)

    def match(self, path: bytes) -> np.ndarray:
        """Tokens of `path` that each row holds, from the first on: int64 [num_rows], whole blocks."""
        levels: list[tuple[int, int]] = []  # (who holds at least so much, bytes), where the holders change
        for holders, end in self._walk(path):
            if levels and levels[-1][0] == holders:
                levels.pop()
            levels.append((holders, end))
        lengths = np.zeros(self.num_rows, dtype=np.int64)
        for holders, end in levels:  # from many holders to few: the deepest level a row is in has the last word
            lengths[self._rows(holders)] = end // TOKEN_BYTES
        return lengths

    def hold(self, row: int, path: bytes, seen_ns: int) -> Grown:
        """A row holds all of `path` (whole blocks), as was seen at seen_ns."""
        node, start, grown = self._root, 0, Grown([], [])
        while start < len(path):
            child = node.children.get(path[start : start + self.block_bytes])
            if child is None:
                child = self._grow(node, path[start:])
            elif not path.startswith(child.edge, start):
                child = self.split(child, self._num_shared(child.edge, path, start))
                grown.heads.append(child)
            if row not in child.seen:
                self.num_blocks[row] += len(child.edge) // self.block_bytes
                child.holders |= 1 << row
                grown.nodes.append(child)
            child.seen[row] = seen_ns
            node, start = child, child.end
        return grown

    def cut(self, row: int, path: bytes, keep: int) -> None:
        """A row no longer holds what follows the first `keep` bytes of a path that it held, nor anything below that."""
        assert keep < len(path), "nothing is cut off"
        node, start = self._root, 0
        while start < len(path):
            child = node.children.get(path[start : start + self.block_bytes])
            if child is None or row not in child.seen:
                return
            if child.end > keep:
                if keep > start:
                    self.split(child, keep - start)
                self._let_go(row, child)
                return
            node, start = child, child.end

    def drop(self, row: int, node: HolderNode) -> None:
        """A row no longer holds a node, and holds none below it."""
        parent = node.parent
        assert parent is not None, "the root is held by nobody"
        self._release(row, node)
        self._join(node if node.seen else parent)

    def purge(self, row: int) -> None:
        """A row holds nothing any more."""
        for child in list(self._root.children.values()):
            if row in child.seen:
                self._let_go(row, child)

    def split(self, node: HolderNode, num_bytes: int) -> HolderNode:
        """Cuts a node's edge after num_bytes (whole blocks); returns the new upper part, with the same holders."""
        parent = node.parent
        assert parent is not None and 0 < num_bytes < len(node.edge)
        head = HolderNode(node.edge[:num_bytes], parent, node.end - len(node.edge) + num_bytes)
        head.seen, head.holders = dict(node.seen), node.holders
        parent.children[head.edge[: self.block_bytes]] = head
        node.edge, node.parent = node.edge[num_bytes:], head
        head.children[node.edge[: self.block_bytes]] = node
        self.num_nodes += 1
        return head

    def check(self) -> None:
        """Raises AssertionError unless counts, holders and edges agree."""
        counts, num_nodes, stack = [0] * self.num_rows, 0, [self._root]
        while stack:
            node = stack.pop()
            for first, child in node.children.items():
                assert child.parent is node and child.end == node.end + len(child.edge), "edges do not add up"
                assert child.edge.startswith(first) and len(child.edge) % self.block_bytes == 0, "not whole blocks"
                assert child.seen and child.holders == sum(1 << row for row in child.seen), "holders disagree"
                assert node is self._root or child.seen.keys() <= node.seen.keys(), "a prefix has a hole"
                for row in child.seen:
                    counts[row] += len(child.edge) // self.block_bytes
                num_nodes += 1
                stack.append(child)
        assert counts == self.num_blocks and num_nodes == self.num_nodes, "blocks or nodes are counted wrong"

    def _walk(self, path: bytes) -> Iterator[tuple[int, int]]:
        """(holders, bytes from the root) of each node on the path; of the last one perhaps a part."""
        node, start = self._root, 0
        while (child := node.children.get(path[start : start + self.block_bytes])) is not None:
            if not path.startswith(child.edge, start):
                yield child.holders, start + self._num_shared(child.edge, path, start)
                return
            yield child.holders, child.end
            node, start = child, child.end

    def _num_shared(self, edge: bytes, path: bytes, start: int) -> int:
        """Leading bytes, in whole blocks, that an edge and path[start:] share; they are known to differ."""
        length = min(len(edge), len(path) - start)
        differs = np.frombuffer(edge, np.uint8, length) != np.frombuffer(path, np.uint8, length, start)
        first = int(differs.argmax())
        shared = first if differs[first] else length
        return shared - shared % self.block_bytes

    def _grow(self, parent: HolderNode, edge: bytes) -> HolderNode:
        leaf = HolderNode(edge, parent, parent.end + len(edge))
        parent.children[edge[: self.block_bytes]] = leaf
        self.num_nodes += 1
        return leaf

    def _let_go(self, row: int, top: HolderNode) -> None:
        """A row holds neither `top` nor anything below it."""
        held, stack = list[HolderNode](), [top]
        while stack:
            node = stack.pop()
            held.append(node)
            stack.extend(child for child in node.children.values() if row in child.seen)
        above = top.parent
        for node in reversed(held):
            self._release(row, node)
        for left in [above, *held]:
            if left is not None and left.seen:  # else it is gone, or was joined to the one below it
                self._join(left)

    def _release(self, row: int, node: HolderNode) -> None:
        self.num_blocks[row] -= len(node.edge) // self.block_bytes
        del node.seen[row]
        node.holders &= ~(1 << row)
        if not node.seen:
            assert node.parent is not None and not node.children, "who holds a node holds every node above it"
            del node.parent.children[node.edge[: self.block_bytes]]
            self.num_nodes -= 1

    def _join(self, node: HolderNode) -> None:
        """Undoes splits that no longer tell anybody apart, above and below a node."""
        for upper in (node, node.parent):
            if upper is None or upper.parent is None or len(upper.children) != 1:
                continue
            (lower,) = upper.children.values()
            if lower.seen == upper.seen:
                lower.edge, lower.parent = upper.edge + lower.edge, upper.parent
                upper.parent.children[lower.edge[: self.block_bytes]] = lower
                upper.seen, upper.holders = {}, 0  # no longer a node: whoever remembers it sees that nobody holds it
                self.num_nodes -= 1

    def _rows(self, holders: int) -> np.ndarray:
        """bool [num_rows] of the rows among a node's holders."""
        bits = np.frombuffer(holders.to_bytes(-(-self.num_rows // 8), "little"), np.uint8)
        return np.unpackbits(bits, count=self.num_rows, bitorder="little").view(bool)
