import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from memserve.kvcache import AggregatedLayout, CacheGeometry, DiscreteLayout, MemPool, RadixIndex
from memserve.kvcache.arena import Arena, TwoTiers
from memserve.transfer.shared_memory import SharedMemory

GEOMETRY = CacheGeometry(num_layers=2, block_size=4, num_kv_heads=3, head_dim=5, dtype=torch.float32)
CPU = torch.device("cpu")

CHILD = """
import sys
from memserve.transfer.shared_memory import SharedHandle
memory = SharedHandle(*map(int, sys.argv[1:])).attach()
print(int(memory[7]))
memory[8] = 42
"""


def test_another_process_maps_the_same_bytes():
    arena = Arena(DiscreteLayout(), GEOMETRY, 4, CPU)
    seen = arena.tensor.view(torch.uint8).view(-1)
    assert not seen.any() and arena.shared.num_bytes == arena.num_bytes == seen.numel()
    seen[7] = 99
    words = [str(n) for n in (arena.shared.pid, arena.shared.fd, arena.shared.num_bytes)]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *words], capture_output=True, text=True, check=True, timeout=120
    )
    assert child.stdout.strip() == "99" and int(seen[8]) == 42


def test_a_handle_of_memory_that_is_gone_is_an_error():
    memory = SharedMemory(16)
    handle = memory.handle
    view = handle.attach()
    view[3] = 5
    assert int(memory.bytes[3]) == 5
    del memory
    with pytest.raises(OSError):
        handle.attach()
    assert int(view[3]) == 5  # what was mapped stays


def test_a_thousand_pools_leave_no_descriptor_open():
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(1000):
        MemPool(GEOMETRY, DiscreteLayout(), 2, RadixIndex, num_dram_blocks=1)
    assert len(list(Path("/dev/fd").iterdir())) <= before + 2


def test_more_than_the_machine_has_is_refused_before_any_is_touched():
    with pytest.raises(MemoryError, match=r"33554432 KV blocks need 64424509440000 bytes \(.* GiB\) on cpu: .* avail"):
        Arena(DiscreteLayout(), CacheGeometry(100, 16, 3, 50, torch.float32), 2**25, CPU)


def test_an_arena_of_no_blocks_shares_nothing():
    assert Arena(AggregatedLayout(), GEOMETRY, 0, CPU).shared is None


@pytest.mark.parametrize("layout", [DiscreteLayout(), AggregatedLayout()])
def test_blocks_move_between_the_tiers_whole_and_alone(layout):
    hbm, dram = Arena(layout, GEOMETRY, 6, CPU), Arena(layout, GEOMETRY, 4, CPU)
    hbm.tensor.copy_(torch.rand(hbm.tensor.shape))
    before = hbm.kv.clone()
    tiers = TwoTiers(hbm, dram, 6)
    tiers.copy(np.array([5, 0, 2], dtype=np.int32), np.array([7, 9, 6], dtype=np.int32))
    assert torch.equal(dram.kv[:, :, [1, 3, 0]], before[:, :, [5, 0, 2]])
    assert not dram.kv[:, :, 2].any() and torch.equal(hbm.kv, before)
    tiers.copy(np.array([9], dtype=np.int32), np.array([1], dtype=np.int32))
    assert torch.equal(hbm.kv[:, :, 1], before[:, :, 0])
    tiers.copy(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32))
