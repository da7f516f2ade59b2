"""A follower of an index's events holds what the index holds, whatever is sent twice, and notices what is not sent."""

import contextlib
import functools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.kvcache import BlockPool, HashIndex, Index, Medium, NullIndex, OutOfBlocks, RadixIndex
from memserve.kvcache.errors import MissedEvents
from memserve.kvcache.events import EventKind, IndexEvent, NobodyFollows
from memserve.kvcache.index_follower import IndexFollower

BLOCK = 2  # tokens in a block
NUM_HBM = 8
A = ("request", "a", 0)


def tokens(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def pool_of(index: type[Index], num_dram_blocks: int) -> BlockPool:
    return BlockPool(NUM_HBM, BLOCK, functools.partial(index), num_dram_blocks=num_dram_blocks)


def publish(pool: BlockPool, prompt: np.ndarray, medium: Medium = Medium.HBM) -> None:
    """Caches the whole blocks of a prompt as a request does, as far as the pool has room."""
    prompt = prompt[: len(prompt) // BLOCK * BLOCK]
    cached = pool.match(prompt).blocks
    pool.retain(cached, A)
    with contextlib.suppress(OutOfBlocks):
        new = pool.alloc(len(prompt) // BLOCK - len(cached), A, medium)
        pool.publish(prompt, np.concatenate([cached, new]))
    pool.release_all(A)


def paths_of_index(pool: BlockPool) -> dict[tuple[int, ...], list[int]]:
    return {tuple(t.tolist()): (blocks >= NUM_HBM).astype(int).tolist() for t, blocks in pool.index.iter_prefixes()}


def assert_same(follower: IndexFollower, pool: BlockPool) -> None:
    assert {tuple(t.tolist()): media.tolist() for t, media in follower.iter_prefixes()} == paths_of_index(pool)
    held = pool.allocator.held_by(("index",))
    in_dram = int(np.count_nonzero(held >= NUM_HBM))
    assert (follower.num_blocks(Medium.HBM), follower.num_blocks(Medium.DRAM)) == (len(held) - in_dram, in_dram)


def follower_of(pool: BlockPool) -> IndexFollower:
    follower = IndexFollower(BLOCK)
    follower.rebuild(pool.follow())
    return follower


PROMPTS = st.lists(st.integers(0, 1), max_size=12).map(lambda values: tokens(*values))
KINDS = st.sampled_from([(RadixIndex, 0), (RadixIndex, 5), (HashIndex, 0)])  # a hash index has no DRAM below it
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), PROMPTS, st.sampled_from(Medium)),
        st.tuples(st.sampled_from(["match", "delete"]), PROMPTS, st.just(Medium.HBM)),
        st.tuples(st.sampled_from(["make_room", "evict", "swap_out"]), st.integers(0, NUM_HBM), st.just(Medium.HBM)),
        st.tuples(st.sampled_from(["swap_in", "clear"]), PROMPTS, st.just(Medium.HBM)),
    ),
    max_size=30,
)


def perform(pool: BlockPool, step: tuple) -> None:
    what, value, medium = step
    if what == "publish":
        publish(pool, value, medium if pool.allocator.num_dram_blocks else Medium.HBM)
    elif what == "make_room":
        pool.alloc(value, A)
        pool.release_all(A)
    elif what == "evict":
        pool.allocator.evicted(pool.index.evict(value))
    elif what == "swap_in":
        pool.retain(found := pool.match(value).blocks, A)
        with contextlib.suppress(OutOfBlocks):
            pool.swap_in(found, A)
        pool.release_all(A)
    elif what == "clear":
        pool.clear()
    else:
        getattr(pool, what)(value)


@settings(max_examples=300, deadline=None)
@given(kind=KINDS, steps=STEPS, data=st.data())
def test_a_follower_equals_the_index_though_events_come_twice(kind, steps, data):
    pool = pool_of(*kind)
    follower, sent = follower_of(pool), []
    for step in steps:
        perform(pool, step)
        sent += pool.drain_events()
        for event in sent[data.draw(st.integers(0, follower.seq), "sent again from") :]:
            follower.apply(event)
        assert_same(follower, pool)
    assert [event.seq for event in sent] == list(range(1, len(sent) + 1))
    pool.check()


@settings(max_examples=100, deadline=None)
@given(kind=KINDS, steps=STEPS, data=st.data())
def test_a_lost_event_is_noticed_and_a_snapshot_heals(kind, steps, data):
    pool = pool_of(*kind)
    publish(pool, tokens(1, 2, 3, 4))
    follower = follower_of(pool)
    for step in [*steps, ("publish", tokens(7, 7), Medium.HBM), ("clear", tokens(), Medium.HBM)]:
        perform(pool, step)
    events = pool.drain_events()
    lost = data.draw(st.integers(0, len(events) - 2), "lost")
    with pytest.raises(MissedEvents, match=rf"event {lost + 2} came after event {lost}"):
        for event in events[:lost] + events[lost + 1 :]:
            follower.apply(event)
    assert follower.seq == lost
    publish(pool, tokens(5, 5, 6, 6))
    follower.rebuild(pool.follow())
    assert_same(follower, pool)
    publish(pool, tokens(5, 5, 7, 7))
    for event in pool.drain_events():  # those that the snapshot covers come once more
        follower.apply(event)
    assert_same(follower, pool)


@pytest.mark.parametrize("index", [RadixIndex, HashIndex])
def test_an_event_names_its_path_its_blocks_and_their_medium(index):
    pool = pool_of(index, 0)
    publish(pool, tokens(1, 2))
    pool.follow()
    publish(pool, tokens(1, 2, 3, 4, 5, 6))
    pool.alloc(NUM_HBM - 1, A)
    whole = tokens(1, 2, 3, 4, 5, 6).tobytes()
    inserted, *removed = pool.drain_events()
    assert inserted == IndexEvent(1, EventKind.INSERTED, whole, 1, 3, Medium.HBM)
    assert removed[0].path == whole and {event.kind for event in removed} == {EventKind.REMOVED}
    assert (removed[-1].first_block, removed[0].end_block) == (1, 3) and pool.drain_events() == []


@pytest.mark.parametrize("index", [RadixIndex, HashIndex])
def test_a_path_that_leaves_block_by_block_is_one_event_until_somebody_hears_of_it(index):
    pool = pool_of(index, 0)
    whole = tokens(*range(1, 2 * NUM_HBM + 1))
    publish(pool, whole)
    follower = follower_of(pool)
    for _ in range(3):
        pool.alloc(1, A)
    [event] = pool.drain_events()
    assert (event.seq, event.path, event.first_block, event.end_block) == (1, whole.tobytes(), NUM_HBM - 3, NUM_HBM)
    pool.alloc(1, A)
    late = follower_of(pool)  # what it was told of, no event changes
    pool.alloc(1, A)
    events = pool.drain_events()
    assert [(event.seq, event.first_block) for event in events] == [(2, NUM_HBM - 4), (3, NUM_HBM - 5)]
    for each in (follower, late):
        for one in [event, *events]:
            each.apply(one)
        assert_same(each, pool)


def test_a_swap_tells_only_of_the_blocks_that_moved():
    pool = pool_of(RadixIndex, 4)
    publish(pool, tokens(1, 2, 3, 4, 5, 6))
    follower = follower_of(pool)
    pool.swap_out(2)
    [event] = pool.drain_events()
    assert (event.kind, event.first_block, event.end_block, event.medium) == (EventKind.MOVED, 1, 3, Medium.DRAM)
    follower.apply(event)
    assert (follower.num_blocks(Medium.HBM), follower.num_blocks(Medium.DRAM)) == (1, 2)
    assert follower.cached_length(tokens(1, 2, 3, 4, 9, 9, 9)) == 4


@pytest.mark.parametrize("index", [RadixIndex, HashIndex, NullIndex])
def test_nothing_is_recorded_until_somebody_follows(index):
    pool = pool_of(index, 0)
    publish(pool, tokens(1, 2, 3, 4))
    pool.clear()
    assert pool.drain_events() == [] and isinstance(pool.index.log, NobodyFollows)
    assert pool.follow().seq == 0


def test_one_pools_follower_is_not_anothers():
    one, other = pool_of(RadixIndex, 0), pool_of(RadixIndex, 0)
    one.follow()
    publish(other, tokens(1, 2))
    assert one.drain_events() == [] and other.drain_events() == []


def test_events_and_snapshots_survive_the_wire():
    pool = pool_of(RadixIndex, 4)
    publish(pool, tokens(1, 2, 3, 4))
    snapshot = pool.follow()
    pool.swap_out(1)
    for value in (snapshot, *pool.drain_events()):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value)) == value


def test_a_log_that_nobody_drains_stays_bounded_and_the_follower_notices(monkeypatch):
    monkeypatch.setattr("memserve.kvcache.events.MAX_UNDRAINED", 3)
    pool = pool_of(RadixIndex, 0)
    follower = follower_of(pool)
    for first in range(5):
        publish(pool, tokens(first, first))
    events = pool.drain_events()
    assert [event.seq for event in events] == [3, 4, 5]
    with pytest.raises(MissedEvents):
        follower.apply(events[0])


def test_blocks_of_two_media_leave_deepest_first():
    pool = pool_of(RadixIndex, 4)
    publish(pool, tokens(1, 2, 3, 4, 5, 6))
    follower = follower_of(pool)
    pool.swap_out(1)
    pool.allocator.evicted(pool.index.evict(2))
    events = pool.drain_events()
    assert [(e.kind, e.medium) for e in events[1:]] == [
        (EventKind.REMOVED, Medium.DRAM),
        (EventKind.REMOVED, Medium.HBM),
    ]
    for event in events:
        follower.apply(event)
    assert_same(follower, pool)
