"""The examples are run, and their answers are those of an engine without a cache."""

import runpy
from pathlib import Path

import torch

from memserve.kvcache import CacheGeometry, DiscreteLayout, MemPool, RadixIndex
from memserve.transfer.link import LinkModel

EXAMPLE = Path(__file__).parents[2] / "examples" / "mempool_alone.py"


def test_it_prints_what_was_cached_and_the_right_answers(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    squares = [sum(t * t for t in [*range(8), *turn]) for turn in ([20, 21, 22], [20, 21, 22, 23, 24], [30])]
    assert printed[:3] == [
        f"r0: 0 of 11 tokens cached, answer {squares[0]}",
        f"r1: 8 of 13 tokens cached, answer {squares[1]}",
        f"r2: 8 of 9 tokens cached, answer {squares[2]}",
    ]


def test_its_answers_survive_eviction_and_block_size():
    answer = runpy.run_path(str(EXAMPLE))["answer"]
    for block_size in (1, 3):
        geometry = CacheGeometry(1, block_size, 1, 1, torch.int64)
        pool = MemPool(geometry, DiscreteLayout(), 12, RadixIndex)
        for number in range(40):
            prompt = [1, 2, 3, *(number * i % 3 for i in range(number % 9))]
            assert answer(pool, str(number), prompt)[0] == sum(t * t for t in prompt)
        assert pool.stats().num_evicted > 0 or block_size == 3
        pool.check()


def test_a_prefix_goes_from_one_pool_to_another(capsys):
    runpy.run_path(str(EXAMPLE.with_name("two_pools.py")), run_name="__main__")
    assert capsys.readouterr().out == "done after 7 us: 8 tokens cached there, contents right: True\n"


def test_more_prefixes_go_from_one_pool_to_another_than_it_has_room_for():
    example = runpy.run_path(str(EXAMPLE.with_name("two_pools.py")))
    pools, now_ns = example["two_pools"](LinkModel(latency_s=5e-6, gb_per_s=50)), 0
    here, there = pools[0], pools[1]
    for number in range(20):
        addrs = here.alloc_mem(2, holder=("request", str(number)))
        ticket = here.transfer_with_insert(1, list(range(100 * number, 100 * number + 8)), addrs)
        here.free_mem(addrs, holder=("request", str(number)))
        while not (ended := example["deliver"](pools, now_ns)):
            now_ns += 1000
        assert ended == [ticket] and ticket.state == "done"
        there.check()
    stats = there.stats()
    assert stats.num_free + stats.num_evictable == stats.num_blocks == 16 and stats.num_evicted > 0
