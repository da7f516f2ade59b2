"""AddressBook: between a pool's block numbers and the addresses that name its blocks in the cluster (section 4.1)."""

import numpy as np

from memserve.kvcache import address
from memserve.kvcache.address import Medium
from memserve.kvcache.allocator import Allocator
from memserve.kvcache.errors import StaleAddress


class AddressBook:
    """One instance's addresses. incarnation: its number in the cluster. Raises ValueError for one out of range."""

    def __init__(self, allocator: Allocator, incarnation: int) -> None:
        if not 0 <= incarnation <= address.MAX_INCARNATION:
            raise ValueError(f"incarnation={incarnation}: expected 0 to {address.MAX_INCARNATION}")
        self.incarnation = incarnation
        self._allocator = allocator

    def addresses(self, blocks: np.ndarray) -> np.ndarray:
        """The present addresses, int64 [n], of block numbers (int32 [n])."""
        generations = self._allocator.generations[blocks]
        hbm = address.encode(self.incarnation, Medium.HBM, generations, blocks)
        if not self._allocator.num_dram_blocks:
            return hbm
        num_hbm = self._allocator.num_blocks
        dram = address.encode(self.incarnation, Medium.DRAM, generations, blocks - num_hbm)
        return np.where(blocks < num_hbm, hbm, dram)

    def resolve(self, addrs: np.ndarray) -> np.ndarray:
        """Block numbers, int32 [n], of addresses (int64 [n]). Raises StaleAddress, naming the first bad one."""
        addrs = np.asarray(addrs)
        if addrs.dtype != np.int64 or addrs.ndim != 1:
            raise ValueError(f"addresses of dtype {addrs.dtype}, shape {addrs.shape}: expected int64 [n]")
        in_dram = address.medium_of(addrs) == Medium.DRAM
        blocks = address.block_of(addrs) + np.where(in_dram, self._allocator.num_blocks, 0).astype(np.int32)
        known = blocks < len(self._allocator.refcounts)
        present = self.addresses(np.where(known, blocks, 0))
        good = known & (present == addrs)
        if not good.all():
            raise StaleAddress(f"{address.describe(int(addrs[~good][0]))}: freed since, or not of this pool")
        return blocks
