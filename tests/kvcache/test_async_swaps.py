"""Swaps that take time: what their callers and everybody else see until they have ended, and when they fail."""

import functools
import threading

import numpy as np
import pytest
from kvcache.small_pools import GEOMETRY, A, B, contents, filled_pool, make_pool

from memserve.kvcache import (
    AtOnce,
    BlockCopier,
    CopyEngine,
    DiscreteLayout,
    InVirtualTime,
    Medium,
    OnAThread,
    StaleAddress,
    Timeouts,
    TransferOptions,
    address,
)
from memserve.kvcache.granularity import ByRequest
from memserve.transfer import InProcess, LinkModel

SECOND = 10**9
SLOW = functools.partial(InVirtualTime, seconds_for=lambda num_blocks: float(num_blocks))


def slow_pool(**options):
    return filled_pool(engine=SLOW, **options)


def test_a_swap_out_is_open_until_its_copy_has_ended_and_only_then_does_the_index_follow():
    pool, tokens, addrs = slow_pool()
    ticket = pool.swap_out(2)
    assert ticket.state == "open" and len(ticket.addrs) == 0
    assert pool.poll(2 * SECOND - 1) == [] and pool.match(tokens).addrs.tolist() == addrs.tolist()
    assert pool.stats().num_free == 0 and pool.stats().num_free_dram == 2
    assert pool.poll(2 * SECOND) == [ticket] and ticket.state == "done"
    assert contents(pool, ticket.addrs) == [4, 3] and (address.medium_of(ticket.addrs) == Medium.DRAM).all()
    assert contents(pool, pool.match(tokens).addrs) == [1, 2, 3, 4] and pool.stats().num_free == 2
    with pytest.raises(StaleAddress):
        pool.retain(addrs[2:], holder=B)
    assert pool.poll(3 * SECOND) == []
    pool.check()


def test_swaps_share_one_link_and_end_in_their_order():
    pool, tokens, _ = slow_pool()
    tickets = [pool.swap_out(1), pool.swap_out(2)]
    assert pool.blocks.next_time_ns == SECOND
    assert pool.poll(SECOND) == tickets[:1] and pool.blocks.next_time_ns == 3 * SECOND
    assert pool.poll(3 * SECOND) == tickets[1:] and pool.blocks.next_time_ns is None
    assert contents(pool, pool.match(tokens).addrs) == [1, 2, 3, 4]


def test_what_somebody_uses_before_it_is_down_stays_where_it_is():
    pool, tokens, addrs = slow_pool()
    ticket = pool.swap_out(2)
    pool.retain(addrs[:3], holder=B)
    pool.poll(2 * SECOND)
    assert contents(pool, ticket.addrs) == [4]
    assert pool.match(tokens).addrs[:3].tolist() == addrs[:3].tolist()
    pool.check()


def test_a_swap_in_fails_when_its_holder_gives_blocks_up_before():
    pool, tokens, _ = slow_pool()
    pool.swap_out(4)
    pool.poll(4 * SECOND)
    found = pool.match(tokens).addrs
    pool.retain(found, holder=A)
    ticket = pool.swap_in(found, holder=A)
    with pytest.raises(ValueError, match="on their way already"):
        pool.swap_in(found[:1], holder=A)
    pool.free_mem(found[1:], holder=A)
    assert pool.poll(8 * SECOND) == [ticket] and ticket.state == "failed"
    assert "gave up blocks before they were here" in ticket.reason
    assert contents(pool, pool.match(tokens).addrs) == [1, 2, 3, 4], "what is cached came up all the same"
    pool.blocks.release_all(A)
    assert (pool.stats().num_evictable, pool.stats().num_free_dram) == (4, 4)
    pool.check()


def test_a_swap_in_that_failed_says_where_the_rest_is():
    pool = make_pool(num_dram_blocks=4, engine=SLOW)
    addrs = pool.alloc_mem(2, Medium.DRAM, holder=A)
    ticket = pool.swap_in(addrs, holder=A)
    pool.free_mem(addrs[:1], holder=A)
    assert pool.poll(2 * SECOND) == [ticket] and ticket.state == "failed"
    pool.free_mem(ticket.addrs, holder=A)
    assert pool.stats().num_free == 8 and pool.stats().num_free_dram == 4


def test_a_block_that_was_given_up_is_not_taken_for_another_of_its_number():
    pool = make_pool(num_dram_blocks=4, engine=SLOW)
    here, below = pool.alloc_mem(1, holder=A), pool.alloc_mem(1, Medium.DRAM, holder=A)
    ticket = pool.swap_in([*here.tolist(), *below.tolist()], holder=A)
    pool.free_mem(here, holder=A)
    anew = pool.alloc_mem(1, holder=A)
    assert address.block_of(anew) == address.block_of(here)
    assert pool.poll(SECOND) == [ticket] and ticket.state == "failed" and "gave up blocks" in ticket.reason
    assert len(ticket.addrs) == 1 and ticket.addrs != anew
    pool.free_mem([*anew.tolist(), *ticket.addrs.tolist()], holder=A)
    pool.check()


def test_whoever_cannot_wait_ends_the_swaps_that_are_in_the_way():
    pool, tokens, _ = slow_pool()
    ticket = pool.swap_out(2)
    pool.alloc_mem(2, holder=B)
    assert ticket.state == "done" and pool.match(tokens).num_tokens == 16
    assert pool.poll(0) == [ticket]
    pool.check()


def test_blocks_kept_free_ahead_count_those_that_are_leaving():
    pool, _, _ = slow_pool()
    for _ in range(3):
        pool.blocks.swap_ahead(3)
    assert pool.blocks.num_swapping == 1
    pool.poll(3 * SECOND)
    assert pool.stats().num_free == 3 and pool.blocks.num_swapping == 0


class Broken(BlockCopier):
    """Copies nothing until it is mended, and says so when it is let."""

    def __init__(self, copier):
        self._copier, self.is_mended, self.is_let = copier, False, threading.Event()
        self.is_let.set()

    def copy(self, source, target):
        self.is_let.wait()
        if not self.is_mended:
            raise RuntimeError(f"cannot copy {len(source)} blocks")
        self._copier.copy(source, target)


class Refuses(CopyEngine):
    """Starts nothing."""

    def __init__(self, copier):
        pass

    def start(self, source, target, now_ns):
        raise RuntimeError(f"cannot copy {len(source)} blocks")


def broken(engine):
    """A pool's engine whose copies fail, and a place where its copier is found."""
    made = []

    def make(copier):
        made.append(Broken(copier))
        return engine(made[0])

    return make, made


def assert_nothing_moved(pool, tokens, addrs):
    assert pool.match(tokens).addrs.tolist() == addrs.tolist() and contents(pool, addrs) == [1, 2, 3, 4]
    assert (
        pool.blocks.num_swapping == pool.blocks.num_waited == pool.stats().num_swapped_in == 0
        and pool.stats().num_free_dram == 4
    )
    assert list(pool.blocks.allocator.holders()) == [("index",)]
    pool.check()


def test_a_copy_that_fails_on_its_thread_is_raised_where_its_end_is_noticed():
    for notice in (
        lambda pool: pool.alloc_mem(4, holder=B),
        lambda pool: pool.blocks.wait(),
        lambda pool: [pool.poll(0) for _ in iter(lambda: pool.blocks.num_swapping, 0)],
    ):
        engine, made = broken(OnAThread)
        pool, tokens, addrs = filled_pool(engine=engine)
        made[0].is_let.clear()
        ticket = pool.swap_out(2)
        made[0].is_let.set()
        with pytest.raises(RuntimeError, match="cannot copy 2 blocks"):
            notice(pool)
        assert_nothing_moved(pool, tokens, addrs)
        assert pool.poll(0) == [ticket] and ticket.state == "failed" and len(ticket.addrs) == 0
        assert ticket.reason == "the copy failed: RuntimeError('cannot copy 2 blocks')"
        made[0].is_mended = True
        pool.alloc_mem(4, holder=B)
        assert pool.match(tokens).num_tokens == 16
        pool.check()


@pytest.mark.parametrize("engine", [AtOnce, Refuses])
def test_a_copy_that_cannot_be_begun_leaves_everything_as_it_was(engine):
    pool, tokens, addrs = filled_pool(engine=broken(engine)[0])
    for call in (lambda: pool.swap_out(2), lambda: pool.alloc_mem(2, holder=B)):
        with pytest.raises(RuntimeError, match="cannot copy 2 blocks"):
            call()
        assert_nothing_moved(pool, tokens, addrs)
    assert pool.poll(0) == []


def test_a_swap_in_whose_copy_fails_leaves_its_holder_the_old_addresses():
    engine, made = broken(SLOW)
    pool = make_pool(num_dram_blocks=4, engine=engine)
    addrs = pool.alloc_mem(3, Medium.DRAM, holder=A)
    ticket = pool.swap_in(addrs, holder=A)
    pool.free_mem(addrs[:1], holder=A)
    with pytest.raises(RuntimeError, match="cannot copy 3 blocks"):
        pool.poll(3 * SECOND)
    assert pool.poll(3 * SECOND) == [ticket] and ticket.state == "failed" and "cannot copy" in ticket.reason
    assert ticket.addrs.tolist() == addrs[1:].tolist() and pool.stats().num_free == 8
    made[0].is_mended = True
    ticket = pool.swap_in(addrs[1:], holder=A)
    assert pool.poll(6 * SECOND) == [ticket] and ticket.state == "done"
    pool.check()


TOKENS = np.arange(16, dtype=np.int32)


def asked_while_its_prefix_comes_up(engine):
    """A pool that caches a block in DRAM, which is on its way up for somebody who has given up, and another's Ask for
    four blocks, of which that is the first: there is room for them once the swap has ended, but for one.
    """
    pool, peer, wires = make_pool(4, 1, engine=engine), make_pool(incarnation=9), InProcess(LinkModel(1e-6, 1.0))
    for end in (pool, peer):
        end.connect(wires, ByRequest(DiscreteLayout(), GEOMETRY), Timeouts(SECOND, SECOND, SECOND))
    pool.insert(TOKENS[:4], pool.alloc_mem(1, Medium.DRAM, holder=A), holder=A)
    pool.swap_in(pool.match(TOKENS).addrs, holder=A)
    pool.blocks.release_all(A)
    pool.alloc_mem(1, holder=B)
    sent = peer.alloc_mem(4, holder=A)
    peer.transfer_with_insert(pool.incarnation, TOKENS, sent, flags=TransferOptions(best_effort=True))
    ((_, ask),) = peer.transfers.drain_outbox()
    return pool, ask


def test_a_prefix_that_moves_while_room_is_made_for_an_ask_is_not_entered_into_the_index_a_second_time():
    pool, ask = asked_while_its_prefix_comes_up(SLOW)
    pool.transfers.receive(9, ask, 0)
    assert pool.blocks.num_swapping == 0 and pool.match(TOKENS).num_tokens == 4
    pool.check()
    pool.transfers.check()


def test_an_ask_for_which_making_room_fails_leaves_nothing_and_may_be_asked_again():
    engine, made = broken(SLOW)
    pool, ask = asked_while_its_prefix_comes_up(engine)
    with pytest.raises(RuntimeError, match="cannot copy 1 blocks"):
        pool.transfers.receive(9, ask, 0)
    assert pool.transfers.num_open == 0 and pool.transfers.is_new(ask)
    made[0].is_mended = True
    pool.transfers.receive(9, ask, 0)
    assert [type(answer).__name__ for _, answer in pool.transfers.drain_outbox()] == ["Grant"]
    pool.check()
