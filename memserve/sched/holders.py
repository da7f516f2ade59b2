"""Holders: instances as the global scheduler sees their caches: who is there, and what each is believed to hold.

Those that only keep KV (role `store`) are no more to it than this, and are never named for a request; those that serve
requests are a Group (group.py).
"""

from collections.abc import Collection, Sequence

import numpy as np

from memserve.decisions import Holding
from memserve.messages import pack_tokens
from memserve.sched.admission import usable_prefix
from memserve.sched.prompt_tree import PromptIndex

NUM_HOLDINGS = 3  # others that a request's instance is told of: it asks one, and the first may be gone


class Holders:
    """labels: of the instances, a row each, none twice.  incarnations: their numbers.  tree: what each is believed to
    hold.
    """

    def __init__(self, labels: Sequence[str], incarnations: Sequence[int], tree: PromptIndex) -> None:
        self.labels, self.incarnations, self.tree = tuple(labels), list(incarnations), tree
        self._here = np.ones(len(self.labels), dtype=bool)
        self._row_of = {label: row for row, label in enumerate(self.labels)}

    def row_of(self, label: str) -> int | None:
        """The row of an instance; None for one of another group."""
        return self._row_of.get(label)

    def is_here(self, label: str) -> bool:
        """Whether an instance is of this group, and neither gone nor draining."""
        row = self.row_of(label)
        return row is not None and bool(self._here[row])

    def add(self, label: str, incarnation: int) -> None:
        """An instance joins, the last row, with nothing cached."""
        self._row_of[label] = len(self.labels)
        self.labels = (*self.labels, label)
        self.incarnations.append(incarnation)
        self.tree.add_row()
        self._here = np.append(self._here, True)

    def remove(self, label: str) -> None:
        """An instance is gone, or drains: nothing is routed to it or fetched from it any more, and what it had cached
        is forgotten.
        """
        row = self.row_of(label)
        if row is not None:
            self._here[row] = False
            self.tree.purge(row)

    def restore(self, label: str) -> None:
        """An instance that was taken for gone is there again."""
        row = self.row_of(label)
        if row is not None:
            self._here[row] = True

    def rows(self, tried: Collection[int] = ()) -> np.ndarray:
        """Who is there, without the rows that were tried: int64 [n]."""
        can = self._here
        if tried:
            can = can.copy()
            can[list(tried)] = False
        return np.flatnonzero(can)

    def holdings(self, tokens: np.ndarray, now_ns: int) -> list[Holding]:
        """Who is believed to have any of a prompt (int32 [n]), the longest first."""
        rows = self.rows()
        return self._longest(rows, self._num_cached(tokens, rows, now_ns)) if len(rows) else []

    def _num_cached(self, tokens: np.ndarray, rows: np.ndarray, now_ns: int) -> np.ndarray:
        """Tokens of a prompt that some rows are believed to have, as far as it can use them: int64 [n], of these."""
        num_cached: np.ndarray = self.tree.match(pack_tokens(tokens[: usable_prefix(len(tokens))]), now_ns)[rows]
        return num_cached

    def _longest(self, rows: np.ndarray, num_cached: np.ndarray) -> list[Holding]:
        """The instances of some rows that have anything, at most NUM_HOLDINGS. num_cached: int64 [n], of these rows."""
        order = np.argsort(-num_cached, kind="stable")[:NUM_HOLDINGS]
        return [Holding(self.incarnations[rows[i]], int(num_cached[i])) for i in order if num_cached[i]]
