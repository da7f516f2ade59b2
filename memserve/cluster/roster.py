"""Roster: which ranks make up which instance. Knows numbers alone.

Rank 0 is the global scheduler and the client. Then come the instances in the order of `cluster.roles`, each with as
many ranks as `cluster.tensor_parallel` says for its role, its leader first:

    roles=[prefill, decode], prefill 1, decode 2        rank 0 | prefill-0: 1 | decode-1: 2 (leader), 3
"""

from collections.abc import Sequence
from itertools import accumulate

from memserve.config.schema import RunConfig
from memserve.kvcache.head_parts import endpoint_of

CONTROLLER = 0


class Roster:
    """sizes: ranks of each instance."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = list(sizes)
        self._leaders = list(accumulate(self._sizes, initial=CONTROLLER + 1))
        self._instances = [instance for instance, size in enumerate(self._sizes) for _ in range(size)]

    @staticmethod
    def of(cfg: RunConfig) -> "Roster":
        return Roster([getattr(cfg.cluster.tensor_parallel, role) for role in cfg.cluster.roles])

    @property
    def world_size(self) -> int:
        return 1 + len(self._instances)

    def leader(self, instance: int) -> int:
        """The rank that speaks for an instance."""
        return self._leaders[instance]

    def ranks(self, instance: int) -> range:
        return range(self._leaders[instance], self._leaders[instance + 1])

    def size(self, instance: int) -> int:
        return self._sizes[instance]

    def instance(self, rank: int) -> int:
        """The instance of a rank other than rank 0."""
        return self._instances[rank - 1]

    def part(self, rank: int) -> int:
        """A rank's number in its instance; 0 for the leader."""
        return rank - self._leaders[self.instance(rank)]

    def endpoints(self, instance: int) -> list[int]:
        """The transport's numbers of an instance's ranks."""
        return [endpoint_of(instance, part) for part in range(self._sizes[instance])]
