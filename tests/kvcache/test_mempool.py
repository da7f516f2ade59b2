"""MemPool: Table 1 in one medium, bad input, and what it says of itself; DRAM is in test_mempool_tiers.py."""

import inspect

import numpy as np
import pytest
from kvcache.small_pools import GEOMETRY, A, B, filled_pool, make_pool

from memserve.kvcache import (
    AggregatedLayout,
    CacheGeometry,
    DiscreteLayout,
    MemPool,
    NotHeld,
    NullIndex,
    OutOfBlocks,
    RadixIndex,
    StaleAddress,
    address,
)
from memserve.kvcache.address import Medium
from memserve.kvcache.inputs import OWN_HOLDERS

TABLE_1 = {  # of the paper, with its names in our spelling, but for what the module says
    "alloc_mem": ["num_blocks", "medium", "instance"],
    "free_mem": ["addrs"],
    "insert": ["tokens", "addrs"],
    "match": ["tokens"],
    "delete": ["tokens"],
    "swap_out": ["num_blocks"],
    "swap_in": ["addrs"],
    "transfer": ["instance", "src_addrs", "dst_addrs", "flags", "private"],
    "transfer_with_insert": ["instance", "tokens", "src_addrs", "dst_addrs", "flags", "private"],
}


def test_the_calls_are_those_of_table_1_in_its_order():
    assert [name for name in vars(MemPool) if name in TABLE_1] == list(TABLE_1)
    for name, arguments in TABLE_1.items():
        beside = ("self", "holder", *(["limit"] if name == "match" else []))
        ours = [argument for argument in inspect.signature(getattr(MemPool, name)).parameters if argument not in beside]
        assert ours == arguments


def test_an_address_says_instance_medium_generation_and_block():
    pool = make_pool()
    pool.free_mem(pool.alloc_mem(2, holder=A), holder=A)
    addrs = pool.alloc_mem(2, holder=A)
    assert addrs.dtype == np.int64 and (addrs > 0).all()
    assert address.incarnation_of(addrs).tolist() == [3, 3]
    assert address.medium_of(addrs).tolist() == [Medium.HBM] * 2
    assert address.generation_of(addrs).tolist() == [1, 1]
    assert address.block_of(addrs).tolist() == [0, 1]
    assert address.describe(int(addrs[1])) == "instance 3, medium 0, block 1, generation 1"


def test_the_largest_fields_do_not_run_into_each_other():
    blocks, generations = np.array([address.MAX_BLOCKS - 1]), np.array([address.GENERATION_MASK])
    addrs = address.encode(address.head(address.MAX_INCARNATION, Medium.HBM), generations, blocks)
    assert addrs[0] > 0 and address.block_of(addrs)[0] == blocks[0]
    assert address.incarnation_of(addrs)[0] == address.MAX_INCARNATION
    assert address.generation_of(addrs)[0] == address.GENERATION_MASK and address.medium_of(addrs)[0] == 0


def test_a_stale_address_is_told_in_its_parts():
    """That every call refuses it is in test_stale_addresses.py."""
    pool = make_pool()
    addrs = pool.alloc_mem(1, holder=A)
    pool.free_mem(addrs, holder=A)
    with pytest.raises(StaleAddress, match="instance 3, medium 0, block 0, generation 0"):
        pool.free_mem(addrs, holder=A)


def test_another_instances_address_is_refused():
    mine, other = make_pool(incarnation=1), make_pool(incarnation=2)
    theirs = other.alloc_mem(1, holder=A)
    mine.alloc_mem(1, holder=A)
    with pytest.raises(StaleAddress, match="instance 2"):
        mine.free_mem(theirs, holder=A)


def test_insert_match_delete_in_the_papers_words():
    pool = make_pool()
    tokens = list(range(10, 18))
    addrs = pool.alloc_mem(2, holder=A)
    assert pool.insert(tokens, addrs, holder=A).tolist() == addrs.tolist()
    pool.free_mem(addrs, holder=A)
    found = pool.match([*tokens, 1, 2, 3])
    assert found.num_tokens == 8 and found.addrs.tolist() == addrs.tolist()
    assert pool.match(tokens, limit=7).num_tokens == 4
    assert pool.delete(tokens) == 2 and pool.match(tokens).num_tokens == 0
    assert pool.stats().num_free == 8
    pool.check()


def test_a_second_insert_of_the_same_prefix_returns_the_first_ones_blocks():
    pool = make_pool()
    tokens = np.arange(8, dtype=np.int32)
    first, second = pool.alloc_mem(2, holder=A), pool.alloc_mem(2, holder=B)
    pool.insert(tokens, first, holder=A)
    assert pool.insert(tokens, second, holder=B).tolist() == first.tolist()
    pool.blocks.release_all(A)
    assert pool.match(tokens).addrs.tolist() == first.tolist()
    pool.blocks.release_all(B)
    assert pool.stats().num_evictable == 2 and pool.stats().num_free == 6
    pool.check()


def test_alloc_evicts_the_least_recently_used_and_never_what_is_held():
    pool = make_pool(num_blocks=4)
    old, new = np.arange(4, dtype=np.int32), np.arange(4, 8, dtype=np.int32)
    for tokens in (old, new):
        pool.insert(tokens, pool.alloc_mem(1, holder=A), holder=A)
        pool.blocks.release_all(A)
    pool.match(old)
    pool.alloc_mem(3, holder=B)
    assert pool.match(new).num_tokens == 0 and pool.match(old).num_tokens == 4
    pool.retain(pool.match(old).addrs, holder=A)
    with pytest.raises(OutOfBlocks, match="1 blocks in HBM asked for"):
        pool.alloc_mem(1, holder=B)
    assert pool.match(old).num_tokens == 4
    pool.check()


def test_a_held_tail_above_a_let_go_prefix_is_out_of_blocks_and_not_a_wrong_eviction():
    pool = make_pool(num_blocks=2)
    tokens = np.arange(8, dtype=np.int32)
    addrs = pool.alloc_mem(2, holder=A)
    pool.insert(tokens, addrs, holder=A)
    pool.free_mem(addrs[:1], holder=A)
    with pytest.raises(OutOfBlocks, match="lie above blocks that are in use"):
        pool.alloc_mem(1, holder=B)
    assert pool.match(tokens).num_tokens == 8
    pool.check()


def test_the_null_index_caches_nothing():
    pool = make_pool(index=NullIndex)
    addrs = pool.alloc_mem(2, holder=A)
    pool.insert(list(range(8)), addrs, holder=A)
    assert pool.match(list(range(8))).num_tokens == 0
    pool.free_mem(addrs, holder=A)
    assert pool.stats().num_free == 8


@pytest.mark.parametrize("tokens", [[1.5, 2, 3, 4], [[1, 2], [3, 4]], ["a"], [-1, 2, 3, 4], [2**40]])
def test_tokens_that_are_not_token_ids_are_refused(tokens):
    pool = make_pool()
    with pytest.raises(ValueError, match="expected int"):
        pool.match(tokens)


@pytest.mark.parametrize("addrs", [np.zeros(1, dtype=np.int32), np.zeros((1, 1), dtype=np.int64), np.zeros(1)])
def test_addresses_of_another_shape_or_dtype_are_refused(addrs):
    with pytest.raises(ValueError, match="expected int64"):
        make_pool().free_mem(addrs, holder=A)


@pytest.mark.parametrize("num_blocks", [-1, 1.5, True, "2"])
def test_a_block_count_that_is_none_is_refused(num_blocks):
    pool = make_pool()
    with pytest.raises(ValueError, match="num_blocks="):
        pool.alloc_mem(num_blocks, holder=A)
    assert pool.stats().num_free == 8


def test_a_foreign_holder_cannot_free():
    pool = make_pool()
    addrs = pool.alloc_mem(2, holder=A)
    with pytest.raises(NotHeld):
        pool.free_mem(addrs, holder=B)
    assert pool.stats().num_free == 6


def test_both_layouts_give_the_same_view_with_their_own_regions():
    for layout, regions in ((DiscreteLayout(), 4), (AggregatedLayout(), 1)):
        pool = make_pool(layout=layout)
        assert pool.kv.shape == (2, 2, 8, 4, 1, 2) and layout.regions_per_block(GEOMETRY) == regions
        pool.kv[1, 0, 5] = 7
        assert pool.arena.tensor.sum() == 7 * 8
    assert make_pool(layout=AggregatedLayout()).arena.tensor[5].is_contiguous()


def double_insert(pool, addrs):
    pool.insert([1, 2, 3, 4], addrs[:1], holder=A)
    pool.insert([5, 6, 7, 8], addrs[:1], holder=A)


@pytest.mark.parametrize(
    "misuse",
    [
        double_insert,
        lambda pool, addrs: pool.insert(list(range(8)), addrs[[0, 0]], holder=A),
        lambda pool, addrs: pool.insert(list(range(8)), addrs, holder=B),
        lambda pool, addrs: pool.retain(addrs, holder=A),
        lambda pool, addrs: pool.retain(addrs[[0, 0]], holder=B),
        lambda pool, addrs: pool.alloc_mem(1, holder=("index",)),
        lambda pool, addrs: pool.free_mem(addrs, holder=("index",)),
        lambda pool, addrs: pool.retain(addrs, holder=("index",)),
        lambda pool, addrs: pool.alloc_mem(1, holder=["a"]),
        lambda pool, addrs: pool.alloc_mem(1, holder=()),
        lambda pool, addrs: pool.match([1, 2, 3, 4], limit=-1),
        lambda pool, addrs: pool.match([1, 2, 3, 4], limit=1.5),
    ],
)
def test_misuse_raises_and_leaves_the_books_in_order(misuse):
    pool = make_pool()
    addrs = pool.alloc_mem(2, holder=A)
    with pytest.raises((ValueError, NotHeld)):
        misuse(pool, addrs)
    pool.check()
    assert pool.stats().num_free == 6


def test_explain_says_who_holds_a_block_and_what_it_caches():
    pool = make_pool()
    addrs = pool.alloc_mem(3, holder=A)
    pool.insert(list(range(10, 18)), addrs[:2], holder=A)
    cached, private = (str(pool.explain(addrs[i])) for i in (1, 2))
    assert cached == (
        "instance 3, medium 0, block 1, generation 0: in use, held by index, request/a/0, "
        "caches tokens [14, 15, 16, 17] at [4, 8) of their prompt"
    )
    assert private.endswith("in use, held by request/a/0, not cached")
    assert pool.explain(addrs[1]).tokens.tolist() == list(range(10, 18))
    pool.free_mem(addrs, holder=A)
    assert pool.explain(addrs[0]).holders == (("index",),) and pool.explain(addrs[2]).state == "stale"
    assert pool.explain(pool.addresses(np.array([5]))[0]).state == "free"
    assert pool.explain(make_pool(incarnation=4).alloc_mem(1, holder=A)[0]).state == "not of this pool"
    pool.check()


@pytest.mark.parametrize("blocks", [[8], [-1], [1.0], np.array(["1"]), 3, [[0]]])
def test_numbers_that_are_no_block_s_have_no_address(blocks):
    pool = make_pool()
    assert pool.arena.num_blocks == 8 and len(pool.addresses([])) == 0
    assert pool.addresses([7]).tolist() == pool.addresses(np.array([7], dtype=np.int32)).tolist()
    with pytest.raises(ValueError, match="blocks .*: expected"):
        pool.addresses(blocks)


@pytest.mark.parametrize("addr", [2**63, 1.5, "1", None, [1]])
def test_what_is_no_address_is_not_explained(addr):
    with pytest.raises(ValueError, match=r"addresses of dtype .*: expected int64 \[n\]"):
        make_pool().explain(addr)


@pytest.mark.parametrize("word", OWN_HOLDERS)
def test_callers_hold_under_no_name_that_the_pool_itself_uses(word):
    pool, tokens, _ = filled_pool()
    found = pool.match(tokens).addrs
    pool.retain(found, holder=A)
    for holder in ((word,), (word, 0), (word, 3, 1)):
        for call in (
            lambda holder=holder: pool.alloc_mem(1, Medium.DRAM, holder=holder),
            lambda holder=holder: pool.free_mem(found, holder=holder),
            lambda holder=holder: pool.insert(tokens, found, holder=holder),
            lambda holder=holder: pool.retain(found, holder=holder),
            lambda holder=holder: pool.swap_in(found, holder=holder),
        ):
            with pytest.raises(ValueError, match=f"begins with none of .*{word}"):
                call()
    assert pool.alloc_mem(1, Medium.DRAM, holder=("my", word)).shape == (1,)
    pool.check()


@pytest.mark.parametrize(
    "sizes", [{"num_blocks": -1}, {"num_blocks": 2.0}, {"num_dram_blocks": "8"}, {"incarnation": 1.5}]
)
def test_sizes_that_are_none_are_refused_by_name(sizes):
    ((name, value),) = sizes.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: expected an integer >= 0"):
        make_pool(**sizes)
    with pytest.raises(ValueError, match="dtype='float32': expected a torch.dtype"):
        CacheGeometry(1, 4, 1, 2, "float32")


def test_the_peak_counts_cached_blocks_that_requests_use():
    pool = make_pool()
    for name in (A, B):
        tokens = [len(name[1])] * 8 if name is A else list(range(8))
        pool.insert(tokens, pool.alloc_mem(2, holder=name), holder=name)
        pool.blocks.release_all(name)
    for tokens in ([1] * 8, list(range(8))):
        pool.retain(pool.match(tokens).addrs, holder=("again", tokens[1]))
    assert pool.stats().peak_used == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"device": "nonsense"}, "device=nonsense: expected cpu, or a device of this machine"),
        ({"device": "cuda:9999"}, "device=cuda:9999: expected cpu, or a device of this machine"),
        ({"device": "meta"}, "device=meta: expected cpu, or a device of this machine, which keeps what is written"),
        ({"device": None}, "device=None: expected cpu, or a device of this machine"),
        ({"device": -1}, "device=-1: expected cpu, or a device of this machine"),
        ({"engine": "on_a_thread"}, "engine='on_a_thread': expected what makes a CopyEngine, such as the class AtOnce"),
        ({"engine": None}, "engine=None: expected what makes a CopyEngine"),
        ({"engine": str}, "engine=<class 'str'> made '<.*>': expected a CopyEngine"),
        ({"geometry": "16 tokens"}, "geometry='16 tokens': expected a CacheGeometry"),
    ],
)
def test_what_is_no_device_no_engine_and_no_geometry_is_refused_by_its_value(words, said):
    parts = {"geometry": GEOMETRY, "layout": DiscreteLayout(), "num_blocks": 4, "index": RadixIndex}
    with pytest.raises(ValueError, match=said):
        MemPool(**{**parts, **words})


def test_what_is_no_layout_no_index_no_medium_and_no_time_is_refused_by_its_value():
    with pytest.raises(ValueError, match=r"layout='discrete': expected an object of a Layout"):
        MemPool(GEOMETRY, "discrete", 4, RadixIndex)
    with pytest.raises(ValueError, match=r"index='radix': expected what makes an index"):
        MemPool(GEOMETRY, DiscreteLayout(), 4, "radix")
    pool = make_pool()
    with pytest.raises(ValueError, match=r"medium='dram': expected <Medium\.HBM: 0> or <Medium\.DRAM: 1>"):
        pool.alloc_mem(1, "dram", holder=("me",))
    for now_ns in (1.5, -1, "soon"):
        with pytest.raises(ValueError, match=r"now_ns=.*: expected an integer >= 0"):
            pool.poll(now_ns)
