"""Swaps that are begun and ended apart, and what befalls their blocks meanwhile."""

from hypothesis import strategies as st
from hypothesis.stateful import rule
from kvcache.pool_machine import PoolMachine, chosen, counts, holders, masks, prompts
from kvcache.pool_model import DRAM
from kvcache.pool_pair import addrs_of, refused

from memserve.kvcache import OutOfBlocks

events = st.lists(st.sampled_from(
    ["used", "used", "computed", "given up", "given up in part", "deleted", "room made", "room made", "more goes",
     "asked for again", "some end"]
), min_size=1, max_size=5)  # fmt: skip


class SwapMachine(PoolMachine):
    """What callers do while blocks are on their way."""

    @rule(count=counts)
    def begin_swap_out(self, count):
        swap = self.model.begin_swap_out(count)
        with self.side.engine.beside():
            self.side.begun(swap, self.pool.swap_out(count))

    @rule(holder=holders, mask=masks)
    def begin_swap_in(self, holder, mask):
        blocks = chosen(self.model.mine(holder), mask)
        addrs = addrs_of(blocks)
        if self.model.are_coming(blocks):
            refused(ValueError, lambda: self.pool.swap_in(addrs, holder=holder))
            return
        swap = self.model.begin_swap_in(holder, blocks)
        with self.side.engine.beside():
            if swap is False:
                refused(OutOfBlocks, lambda: self.pool.swap_in(addrs, holder=holder))
                self.side.learn()
            else:
                self.side.begun(swap, self.pool.swap_in(addrs, holder=holder))

    @rule(mask=masks)
    def end_swaps(self, mask):
        """Some copies end, in any order."""
        swaps = chosen(self.model.open_swaps, mask)
        self.side.engine.end([self.side.swaps[swap] for swap in swaps])
        self.pool.blocks.poll(0)
        self.model.end_swaps(swaps)

    @rule(holder=holders, other=holders, tokens=prompts, count=counts, wanted=counts, mask=masks, several=events)
    def down_beside(self, holder, other, tokens, count, wanted, mask, several):
        """Cached blocks on their way down, what may happen until they are there, and their end."""
        self.compute_and_insert(holder, tokens, "as it lies")
        self.abort(holder)
        self.begin_swap_out(count)
        self.befall(several, holder, other, tokens, wanted, mask)

    @rule(holder=holders, other=holders, tokens=prompts, wanted=counts, mask=masks, several=events)
    def up_beside(self, holder, other, tokens, wanted, mask, several):
        """The same of a holder's blocks on their way up; it and another one held nothing else before."""
        self.abort(holder)
        self.abort(other)
        self.compute_and_insert(holder, tokens, "as it lies")
        self.preempt_to_dram(holder, -1 << self.model.sizes[DRAM], resume=False)  # as many as may fit
        self.begin_swap_in(holder, 0)
        self.befall(several, holder, other, tokens, wanted, mask)

    def befall(self, several, *things):
        for event in several:
            self.befalls(event, *things)
        self.end_swaps(0)

    def befalls(self, event, holder, other, tokens, wanted, mask):
        """One of `events`."""
        if event == "used":
            self.compute_and_insert(other, tokens, "as it lies")
        elif event == "computed":
            self.compute_and_insert(other, tokens, "unused")
        elif event == "given up":
            self.abort(holder)
        elif event == "given up in part":
            self.free_mem(holder, mask)
        elif event == "deleted":
            self.delete(tokens)
        elif event == "room made":
            self.try_alloc(other, wanted)
            self.abort(other)
        elif event == "more goes":
            self.begin_swap_out(wanted)
        elif event == "asked for again":
            self.begin_swap_in(holder, mask)
        else:
            self.end_swaps(mask)
