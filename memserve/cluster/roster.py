"""Roster: which ranks make up which instance. Knows numbers alone.

Rank 0 is the global scheduler and the client. Then come the instances in the order of `cluster.roles`, each with as
many ranks as `cluster.tensor_parallel` says for its role, its leader first; then the spares, which wait to be one:

    roles=[prefill, decode], prefill 1, decode 2        rank 0 | prefill-0: 1 | decode-1: 2 (leader), 3

An instance that comes later is a rank that was spare, or whose instance has left; its number is a new one.
"""

from collections.abc import Sequence

from memserve.config.per_role import num_ranks
from memserve.config.schema import RunConfig
from memserve.kvcache.head_parts import endpoint_of

CONTROLLER = 0


class Roster:
    """sizes: ranks of each instance that is there from the start.  num_spares: ranks beyond those."""

    def __init__(self, sizes: Sequence[int], num_spares: int = 0) -> None:
        self._ranks: dict[int, range] = {}
        for instance, size in enumerate(sizes):
            first = self._ranks[instance - 1].stop if instance else CONTROLLER + 1
            self._ranks[instance] = range(first, first + size)
        self._first_spare = CONTROLLER + 1 + sum(sizes)
        self.world_size = self._first_spare + num_spares
        self._instances = {rank: instance for instance, ranks in self._ranks.items() for rank in ranks}

    @staticmethod
    def of(cfg: RunConfig) -> "Roster":
        return Roster([num_ranks(cfg, role) for role in cfg.cluster.roles], cfg.cluster.spares)

    def ranks_of_member(self, number: int) -> range:
        """The ranks of who is started by itself: of an instance that is there from the start, or a spare one."""
        if number in self._ranks:
            return self._ranks[number]
        rank = self._first_spare + number - len(self._ranks)
        return range(rank, rank + 1)

    def assign(self, instance: int, rank: int) -> None:
        """A rank, with those that were with it from the start, is an instance from now on, and not what it was before;
        nothing new of one that is known.
        """
        if instance in self._ranks:
            return
        self._ranks[instance] = next(
            (ranks for ranks in self._ranks.values() if ranks.start == rank), range(rank, rank + 1)
        )
        self._instances |= dict.fromkeys(self._ranks[instance], instance)

    def release(self, instance: int) -> None:
        """An instance has left, or is gone: its ranks are none any more."""
        for rank in self._ranks[instance]:
            if self._instances.get(rank) == instance:
                del self._instances[rank]

    def leader(self, instance: int) -> int:
        """The rank that speaks for an instance, or spoke for one that has left."""
        return self._ranks[instance].start

    def ranks(self, instance: int) -> range:
        return self._ranks[instance]

    def size(self, instance: int) -> int:
        return len(self._ranks[instance])

    def instance(self, rank: int) -> int | None:
        """The instance of a rank; None for rank 0 and for one that is spare."""
        return self._instances.get(rank)

    def part(self, rank: int) -> int:
        """A rank's number in its instance; 0 for the leader, and for a rank that may become one."""
        instance = self.instance(rank)
        return 0 if instance is None else rank - self.leader(instance)

    def endpoints_of_others(self, instance: int) -> list[int]:
        """Those of all other instances that there are, as far as they have been heard of."""
        others = sorted({*self._instances.values()} - {instance})
        return [endpoint for other in others for endpoint in self.endpoints(other)]

    def endpoints(self, instance: int) -> list[int]:
        """The transport's numbers of an instance's ranks; of one that nobody has heard of it is one rank."""
        return [endpoint_of(instance, part) for part in range(len(self._ranks.get(instance, range(1))))]
