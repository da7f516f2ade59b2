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
        none = np.zeros(1, dtype=np.int32)
        self._hbm_head = int(address.encode(incarnation, Medium.HBM, none, none)[0])

    def addresses(self, blocks: np.ndarray) -> np.ndarray:
        """The present addresses, int64 [n], of block numbers (int [n])."""
        a = self._allocator
        hbm: np.ndarray = a.generations[blocks].astype(
            np.int64
        )  # address.encode in place: this is half of what alloc_mem takes
        hbm &= address.GENERATION_MASK
        hbm <<= address.BLOCK_BITS
        hbm |= blocks
        hbm |= self._hbm_head
        if not a.num_dram_blocks:
            return hbm
        dram = address.encode(self.incarnation, Medium.DRAM, a.generations[blocks], blocks - a.num_blocks)
        return np.where(blocks < a.num_blocks, hbm, dram)

    def resolve(self, addrs: np.ndarray) -> np.ndarray:
        """Block numbers, int32 [n], of addresses (int64 [n]). Raises StaleAddress, naming the first bad one."""
        addrs = np.asarray(addrs)
        if addrs.dtype != np.int64 or addrs.ndim != 1:
            raise ValueError(f"addresses of dtype {addrs.dtype}, shape {addrs.shape}: expected int64 [n]")
        blocks: np.ndarray = addrs & (address.MAX_BLOCKS - 1)
        if self._allocator.num_dram_blocks:
            blocks += np.where(address.medium_of(addrs) == Medium.DRAM, self._allocator.num_blocks, 0)
        num_blocks = len(self._allocator.refcounts)
        if len(blocks) and int(blocks.max()) >= num_blocks:
            good = self.addresses(np.minimum(blocks, num_blocks - 1)) == addrs
            good &= blocks < num_blocks
        else:
            good = self.addresses(blocks) == addrs
        if not good.all():
            raise StaleAddress(f"{address.describe(int(addrs[~good][0]))}: freed since, or not of this pool")
        numbers: np.ndarray = blocks.astype(np.int32)
        return numbers
