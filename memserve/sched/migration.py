"""Migration: how an answer goes on at another instance of its role. Knows numbers of blocks; moves nothing.

    stop_and_copy   it stops, all of its KV moves, it goes on: it stands still for as long as that takes
    live            what is final of its KV moves while it is decoded, then what was written meanwhile, and so on, in
                    ever shorter copies; it stops for the last one alone

As virtual machines migrate (Clark et al., NSDI 2005), and requests in Llumnix (arXiv 2406.03243). A policy of one's own
is one class, named in the config by `migration._target_=my_package.MyMigration`.
"""

from abc import ABC, abstractmethod


class MigrationPolicy(ABC):
    """Asked between two steps of an answer that is to migrate, first and after each copy."""

    @abstractmethod
    def copies_ahead(self, num_left: int, num_before: int | None) -> bool:
        """Whether the answer goes on meanwhile, rather than stop for what is left.

        num_left: whole blocks of its KV that did not go ahead yet, 1 or more.  num_before: those that the copy before
        this one was asked for; None: this would be the first. A pure function.
        """


class StopAndCopy(MigrationPolicy):
    """It stops first. The baseline."""

    def copies_ahead(self, num_left: int, num_before: int | None) -> bool:
        return False


class LiveMigration(MigrationPolicy):
    """Copies ahead as long as each copy is shorter than the one before. Where the link is slower than the answer grows
    that ends, and the answer stops.
    """

    def copies_ahead(self, num_left: int, num_before: int | None) -> bool:
        return num_before is None or num_left < num_before
