"""AddressBook: between a pool's block numbers and the addresses that name its blocks in the cluster (section 4.1)."""

import numpy as np

from memserve.kvcache import address
from memserve.kvcache.address import Medium
from memserve.kvcache.allocator import Allocator
from memserve.kvcache.errors import StaleAddress
from memserve.kvcache.inputs import as_addrs


class AddressBook:
    """One instance's addresses, and the names of its tickets. incarnation: its number in the cluster.

    Raises ValueError for one out of range.
    """

    def __init__(self, allocator: Allocator, incarnation: int) -> None:
        if not 0 <= incarnation <= address.MAX_INCARNATION:
            raise ValueError(f"incarnation={incarnation}: expected 0 to {address.MAX_INCARNATION}")
        self.incarnation = incarnation
        self._allocator = allocator
        self._num_tickets = 0
        self._hbm_head = address.head(incarnation, Medium.HBM)
        self._dram_head = address.head(incarnation, Medium.DRAM)

    def addresses(self, blocks: np.ndarray) -> np.ndarray:
        """The present addresses, int64 [n], of block numbers (int [n])."""
        places = blocks.astype(np.intp)
        generations = self._allocator.generations[places]
        if not self._allocator.num_dram_blocks:
            return address.encode(self._hbm_head, generations, places)
        num_hbm = self._allocator.num_blocks
        in_dram = places >= num_hbm
        heads = np.where(in_dram, self._dram_head, self._hbm_head)
        return address.encode(heads, generations, places - num_hbm * in_dram)

    def new_ticket_id(self) -> tuple[int, int]:
        """(incarnation, number): no other ticket of the cluster has it."""
        self._num_tickets += 1
        return self.incarnation, self._num_tickets

    def are_elsewhere(self, addrs: np.ndarray) -> bool:
        """Whether addresses (int64 [n], n >= 1) name blocks of another instance, all of them of the same one."""
        addrs = np.asarray(addrs)
        if addrs.dtype != np.int64 or addrs.ndim != 1 or not len(addrs):
            return False
        owners = address.incarnation_of(addrs)
        return bool(owners[0] != self.incarnation and (owners == owners[0]).all())

    def resolve(self, addrs: np.ndarray) -> np.ndarray:
        """Block numbers, int32 [n], of addresses (int64 [n]). Raises StaleAddress, naming the first bad one."""
        addrs = as_addrs(addrs)
        places = addrs & (address.MAX_BLOCKS - 1)
        if self._allocator.num_dram_blocks:
            places += np.where(address.medium_of(addrs) == Medium.DRAM, self._allocator.num_blocks, 0)
        try:
            present = self.addresses(places)
        except IndexError:  # a block of some larger pool
            present = self.addresses(np.minimum(places, len(self._allocator.generations) - 1))
        if present.tobytes() != addrs.tobytes():
            bad = addrs[present != addrs][0]
            raise StaleAddress(f"{address.describe(int(bad))}: freed since, or not of this pool")
        numbers: np.ndarray = places.astype(np.int32)
        return numbers
