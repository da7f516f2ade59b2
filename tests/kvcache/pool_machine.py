"""Every operation on a MemPool, rightly and wrongly used, in any order: hypothesis finds the order that breaks it."""

import functools

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from kvcache.pool_model import DRAM, HBM
from kvcache.pool_pair import BLOCK_SIZE, NUM_BLOCKS, PoolPair, addrs_of, as_addrs, refused

from memserve.kvcache import NotHeld, OutOfBlocks, Placement, StaleAddress

holders = st.sampled_from([("request", name, 0) for name in "abcd"])
lengths = st.integers(0, 7 * BLOCK_SIZE)
# zeros and then another tail: most prompts share a prefix with most others, and leave it anywhere; most are long
prompts = st.builds(
    lambda missing, own, tail: ([0] * (7 * BLOCK_SIZE - own) + [tail] * own)[: 7 * BLOCK_SIZE - missing],
    lengths, lengths, st.integers(1, 3),
)  # fmt: skip
masks = st.integers(0, 2 ** (2 * NUM_BLOCKS) - 1)  # which of at most 2 * NUM_BLOCKS blocks are left out
counts = st.integers(0, NUM_BLOCKS + 1)
not_counts = st.sampled_from([-1, True, 1.0, "1", None])
not_tokens = st.sampled_from([[0.5, 1.0], [[0, 1]], [-1, 0], [2**31, 0], ["a", "b"], [None, 1], [True, False]])
not_addresses = st.sampled_from([[0.0], np.zeros(1, dtype=np.int32), np.zeros((1, 1), dtype=np.int64), ["a"], 0])
not_holders = st.sampled_from(
    [("index",), ("swap", 0), ("transfer", 3, 0), ("quarantine", 4, 1), ("remote", 3, 1), "a", ["request", "a"], None,
     ("request", 1.5), ()]
)  # fmt: skip


class PoolMachine(PoolPair):
    """What callers do. After a wrong call the invariants see that nothing changed."""

    # -- memory ---------------------------------------------------------------------------------------------------

    @rule(holder=holders, count=counts, medium=st.sampled_from([HBM, HBM, DRAM]))
    def alloc_mem(self, holder, count, medium):
        self.try_alloc(holder, count, medium)

    @rule(holder=holders, count=st.integers(0, 2 * NUM_BLOCKS))
    def alloc_mixed(self, holder, count):
        blocks = self.model.alloc_mixed(holder, count)
        if blocks is None:
            refused(OutOfBlocks, lambda: self.pool.alloc_mem(count, Placement.MIXED, holder=holder))
            self.side.learn()
        else:
            self.side.follow(blocks, self.pool.alloc_mem(count, Placement.MIXED, holder=holder))
            self.side.write(blocks)

    def try_alloc(self, holder, count, medium=HBM):
        """New blocks, or None where the model says that there is no room."""
        if not self.model.room_for(count, medium):
            refused(OutOfBlocks, lambda: self.pool.alloc_mem(count, medium, holder=holder))
            self.side.learn()
            return None
        addrs = self.pool.alloc_mem(count, medium, holder=holder)
        blocks = self.model.alloc(holder, [None] * count, medium)
        self.side.follow(blocks, addrs)
        self.side.write(blocks)
        return blocks

    @rule(holder=holders, mask=masks)
    def free_mem(self, holder, mask):
        blocks = chosen(self.model.mine(holder), mask)
        self.pool.free_mem(addrs_of(blocks), holder=holder)
        self.model.drop(holder, blocks)

    @rule(holder=holders)
    def abort(self, holder):
        blocks = self.model.mine(holder)
        assert self.pool.blocks.release_all(holder) == len(blocks)
        self.model.drop(holder, blocks)

    @rule(holder=holders, mask=masks)
    def retain(self, holder, mask):
        blocks = chosen(self.model.of_others(holder), mask)
        self.pool.retain(addrs_of(blocks), holder=holder)
        self.model.take(holder, blocks)

    @rule(count=counts)
    def swap_out(self, count):
        moved = self.model.swap_out(count)
        ticket = self.pool.swap_out(count)
        assert ticket.ended and ticket.ticket_id[0] == self.pool.incarnation
        self.side.follow(moved, ticket.addrs)

    @rule(holder=holders, mask=masks)
    def swap_in(self, holder, mask):
        self.bring_back(holder, chosen(self.model.mine(holder), mask))

    def bring_back(self, holder, blocks):
        """The blocks as they are then; as they were where HBM has no room, or where some of them are coming."""
        addrs = addrs_of(blocks)
        if self.model.are_coming(blocks):
            refused(ValueError, lambda: self.pool.swap_in(addrs, holder=holder))
            return blocks
        here = self.model.swap_in(holder, blocks)
        if here is None:
            refused(OutOfBlocks, lambda: self.pool.swap_in(addrs, holder=holder))
            self.side.learn()
            return blocks
        self.side.follow(here, self.pool.swap_in(addrs, holder=holder).addrs)
        return here

    @rule(holder=holders, mask=masks, resume=st.booleans())
    def preempt_to_dram(self, holder, mask, resume):
        blocks = [b for b in chosen(self.model.mine(holder), mask) if not self.model.are_coming([b])]
        numbers = self.pool.resolve(addrs_of(blocks))
        there = self.model.move_out(holder, blocks)
        moved = self.pool.blocks.move_out(numbers, holder)
        assert (moved is None) == (there is None)
        self.side.follow(there or [], self.pool.addresses(numbers[:0] if moved is None else moved))
        if there and resume:
            self.bring_back(holder, there)

    # -- index ----------------------------------------------------------------------------------------------------

    @rule(holder=holders, several=st.lists(prompts, min_size=1, max_size=4))
    def serve(self, holder, several):
        """As requests from their arrival to their end, one after the other."""
        for tokens in several:
            self.compute_and_insert(holder, tokens, cached="swapped in")
            self.abort(holder)

    @rule(holder=holders, tokens=prompts, cached=st.sampled_from(["swapped in", "as it lies", "unused"]))
    def compute_and_insert(self, holder, tokens, cached):
        """As a running request: match and hold, compute the rest, insert. Or compute all of it, a second time."""
        path = self.model.index.prefixes(tokens)
        found = [] if cached == "unused" else self.matched(tokens)
        if any(s.holders[1] == holder and not set(found).isdisjoint(s.sources) for s in self.model.open_swaps):
            return  # given up and taken anew while they move under this very name: its ticket will say where to
        self.pool.retain(addrs_of([b for b in found if b not in self.model.mine(holder)]), holder=holder)
        self.model.take(holder, found)
        if cached == "swapped in":
            found = self.bring_back(holder, found)
        new = self.try_alloc(holder, len(path) - len(found))
        if new is not None:
            self.compute(new, path[len(found) :])
            self.insert(holder, tokens, [*found, *new])

    @rule(holder=holders, tokens=prompts, cached=st.integers(-6, 6), mask=masks, turn=st.integers(0, 7))
    def insert_any(self, holder, tokens, cached, mask, turn):
        """What the holder has, in any order and medium, as the KV of any prompt, cached or not; refused if it must."""
        mine = chosen([b for b in self.model.mine(holder) if self.model.is_at_rest(b)], mask)
        if 0 <= cached < len(self.model.index.blocks):  # in DRAM and long ones first
            by_depth = sorted(self.model.index.blocks.items(), key=lambda item: (-item[1].medium, -len(item[0])))
            tokens = by_depth[cached][0]
        path = self.model.index.prefixes(tokens)[: len(mine)]
        blocks = [*mine[turn:], *mine[:turn]][: len(path)]
        if path and not self.model.may_insert(path[-1], blocks):
            refused(ValueError, lambda: self.pool.insert(path[-1], addrs_of(blocks), holder=holder))
        elif path:
            cached = self.model.index.blocks.values()
            fresh = [(block, prefix) for block, prefix in zip(blocks, path, strict=True) if block not in cached]
            self.compute([block for block, _ in fresh], [prefix for _, prefix in fresh])
            self.insert(holder, path[-1], blocks)

    def insert(self, holder, tokens, blocks):
        whole, addrs = list(tokens[: len(blocks) * BLOCK_SIZE]), addrs_of(blocks)
        canonical = self.model.insert(holder, whole, blocks)
        self.side.follow(canonical, self.pool.insert(whole, addrs, holder=holder))

    @rule(tokens=prompts, limit=st.none() | lengths)
    def match(self, tokens, limit):
        self.matched(tokens, limit)

    def matched(self, tokens, limit=None):
        found = self.pool.match(tokens, limit)
        blocks = self.model.index.match(tokens, limit)
        assert found.addrs.tolist() == addrs_of(blocks).tolist()
        assert found.num_tokens == len(blocks) * BLOCK_SIZE
        return blocks

    @rule(tokens=prompts)
    def delete(self, tokens):
        gone = self.model.index.delete(tokens)
        assert self.pool.delete(tokens) == len(gone)
        self.model.bury(gone)

    @rule(sure=st.integers(0, 4))
    def clear(self, sure):
        if not sure:
            gone = self.model.index.clear()
            assert self.pool.blocks.clear() == len(gone)
            self.model.bury(gone)

    # -- what is told -----------------------------------------------------------------------------------------------

    @rule(pick=st.integers(0, 999))
    def explain(self, pick):
        """Of any block in use: who holds it and what it caches. Of others: why they are not in use."""
        if blocks := list(self.model.refcounts()):
            block = blocks[pick % len(blocks)]
            story = self.pool.explain(block.addr)
            prefix = next((list(p) for p, cached in self.model.index.blocks.items() if cached is block), None)
            assert story.state == "in use" and sorted(story.holders) == sorted(self.model.holders_of(block))
            assert (None if story.tokens is None else story.tokens.tolist()) == prefix
        if self.model.dead:
            assert self.pool.explain(self.model.dead[pick % len(self.model.dead)]).state == "stale"
        for block in self.sides[self.there].model.refcounts():
            assert self.pool.explain(block.addr).state == "not of this pool"

    @rule()
    def lose_events(self):
        self.side.missed |= bool(self.pool.drain_events())

    # -- wrong calls: refused by name, and the invariants below see that nothing changed --------------------------

    @precondition(lambda self: self.model.dead)
    @rule(holder=holders, pick=st.integers(0, 999), mask=masks, place=st.integers(0, 9))
    def use_a_dead_address(self, holder, pick, mask, place):
        addrs = addrs_of(chosen(self.model.mine(holder), mask)).tolist()
        addrs.insert(place, self.model.dead[pick % len(self.model.dead)])
        self.refused_everywhere(StaleAddress, addrs, holder)

    @rule(holder=holders, mask=masks)
    def use_an_address_of_another_pool(self, holder, mask):
        if theirs := self.sides[self.there].model.open_to_all():
            mine = addrs_of(chosen(self.model.mine(holder), mask)).tolist()
            self.refused_everywhere(StaleAddress, [*mine, theirs[mask % len(theirs)].addr], holder)

    @rule(holder=holders, bad=not_holders, count=not_counts, tokens=not_tokens, addrs=not_addresses)
    def say_what_is_no_such_thing(self, holder, bad, count, tokens, addrs):
        self.refused_everywhere(ValueError, addrs, holder)
        mine = addrs_of(self.model.mine(holder)[:1])
        refused(ValueError, lambda: self.pool.alloc_mem(1, holder=bad))
        self.refused_everywhere(ValueError, mine, bad)
        refused(ValueError, lambda: self.pool.alloc_mem(count, holder=holder))
        refused(ValueError, lambda: self.pool.swap_out(count))
        refused(ValueError, lambda: self.pool.insert(tokens, mine, holder=holder))
        for call in (self.pool.match, self.pool.delete):
            refused(ValueError, functools.partial(call, tokens))
        if count is not None:
            refused(ValueError, lambda: self.pool.match([0, 0], count))

    @rule(holder=holders, mask=masks)
    def use_what_another_holds(self, holder, mask):
        if foreign := self.model.of_others(holder):
            addrs = addrs_of([*chosen(self.model.mine(holder), mask), foreign[mask % len(foreign)]])
            for call in self.calls(addrs, holder, but="retain"):
                refused(NotHeld, call)

    @rule(holder=holders, mask=masks)
    def use_a_block_twice_at_once(self, holder, mask):
        if blocks := chosen(self.model.mine(holder), mask):
            self.refused_everywhere((NotHeld, ValueError), addrs_of([*blocks, blocks[0]]), holder)
            refused(ValueError, lambda: self.pool.retain(addrs_of(blocks), holder=holder))
            refused(ValueError, lambda: self.pool.insert([0], addrs_of(blocks), holder=holder))

    def calls(self, addrs, holder, but=None):
        """Every call of the pool's that takes addresses, with these."""
        tokens = [0] * (BLOCK_SIZE * np.size(addrs))
        array = as_addrs(addrs)
        calls = {
            "free_mem": lambda: self.pool.free_mem(array, holder=holder),
            "retain": lambda: self.pool.retain(array, holder=holder),
            "swap_in": lambda: self.pool.swap_in(array, holder=holder),
            "insert": lambda: self.pool.insert(tokens, array, holder=holder),
        }
        return [call for name, call in calls.items() if name != but]

    def refused_everywhere(self, error, addrs, holder):
        for call in self.calls(addrs, holder):
            refused(error, call)


def chosen(blocks, mask):
    """Those not at the mask's set bits: a small mask, the likeliest, leaves few out."""
    return [block for i, block in enumerate(blocks) if not mask >> i & 1]
