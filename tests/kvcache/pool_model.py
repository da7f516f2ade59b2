"""What a MemPool must hold and answer, spelled out: blocks as objects, their holders as lists, room made by the book.

A block that moves keeps its object and gets an address that the model cannot know: None, until the machine has asked
the pool for it. So an operation may move blocks and evict one of them a moment later, and nothing is guessed.
"""

from collections import Counter

from kvcache.brute_force import BruteForceIndex

from memserve.kvcache import Medium

HBM, DRAM = Medium.HBM, Medium.DRAM


class Block:
    """medium and addr: where it is now. kv: the number that all of its KV must read as; None while others write it."""

    def __init__(self, medium, kv, addr=None):
        self.medium, self.kv, self.addr = medium, kv, addr


class OpenSwap:
    """sources are on their way to targets, for a holder of theirs or for the index.  addrs: once it has ended, where
    the ticket says that its blocks are; those that are held still, if it failed.  blocks: that the holder named.
    """

    def __init__(self, number, sources, targets, holder, blocks):
        self.holders = ("swap", number), holder
        self.sources, self.targets, self.blocks = sources, targets, blocks
        self.is_open, self.failed, self.addrs = True, False, []


class PoolModel:
    """held: holder -> blocks, in the order taken. dead: addresses of freed blocks. sizes: medium -> blocks.

    settled: tickets that still hold blocks, since their sender asked for that, and are under way no more.
    scratch: numbers that no other block's KV has.
    """

    def __init__(self, num_blocks, num_dram_blocks, scratch, **index):
        self.sizes = {HBM: num_blocks, DRAM: num_dram_blocks}
        self.index = BruteForceIndex(self, **index)
        self.held = {}
        self.settled = set()
        self.dead = []
        self.num_evicted = self.num_swapped_out = self.num_swapped_in = 0
        self.open_swaps, self.num_swaps = [], 0
        self._scratch = scratch

    def __getitem__(self, block):
        """The block's number of holders, the index included."""
        return self.refcounts()[block]

    def refcounts(self):
        return Counter(b for blocks in [*self.held.values(), self.index.blocks.values()] for b in blocks)

    def alive(self, medium):
        return [block for block in self.refcounts() if block.medium is medium]

    def free(self, medium):
        return self.sizes[medium] - len(self.alive(medium))

    def evictable(self, medium):
        counts = self.refcounts()
        return [b for b in self.index.blocks.values() if counts[b] == 1 and b.medium is medium]

    def available(self, medium):
        """Free, or free as soon as somebody asks."""
        return self.free(medium) + len(self.evictable(medium))

    def mine(self, holder):
        return self.held.get(holder, [])

    def of_others(self, holder):
        """Blocks in use that this holder does not hold, and may."""
        return [block for block in self.open_to_all() if block not in self.mine(holder)]

    def open_to_all(self):
        """Blocks in use, but those that are only there for another pool to write to."""
        closed = {b for h, blocks in self.held.items() if h[0] in ("remote", "quarantine") for b in blocks}
        return [block for block in self.refcounts() if block.kv is not None and block not in closed]

    def is_at_rest(self, block):
        """Whether no other pool reads or writes it, so that a holder may compute it anew."""
        return all(h[0] == "request" for h in self.holders_of(block) if h != ("index",))

    def holders_of(self, block):
        cached = [("index",)] if block in self.index.blocks.values() else []
        return [*cached, *(holder for holder, blocks in self.held.items() if block in blocks)]

    # -- holders --------------------------------------------------------------------------------------------------

    def alloc(self, holder, addrs, medium):
        """New blocks at these addresses, each with KV of its own."""
        blocks = [Block(medium, next(self._scratch), addr) for addr in addrs]
        self.take(holder, blocks)
        return blocks

    def alloc_mixed(self, holder, num_blocks):
        """Blocks of both media, those in HBM first: its free ones, then DRAM's, then what HBM caches. None: no room."""
        num_below = min(max(0, num_blocks - self.free(HBM)), self.available(DRAM))
        if not self.room_for(num_below, DRAM):
            num_below = self.free(DRAM)
        below = self.alloc(holder, [None] * num_below, DRAM)
        if not self.room_for(num_blocks - num_below, HBM):
            self.drop(holder, below)
            return None
        return [*self.alloc(holder, [None] * (num_blocks - num_below), HBM), *below]

    def take(self, holder, blocks):
        """The holder takes what it does not hold yet."""
        mine = self.held.setdefault(holder, [])
        mine += [block for block in blocks if block not in mine]
        self._forget_empty()

    def drop(self, holder, blocks):
        self.held[holder] = [block for block in self.mine(holder) if block not in blocks]
        self._forget_empty()
        self.bury(blocks)

    def bury(self, blocks):
        """Addresses of blocks that nobody holds any more are dead for good."""
        counts = self.refcounts()
        self.dead += [block.addr for block in blocks if not counts[block] and block.addr is not None]

    def _forget_empty(self):
        self.held = {holder: blocks for holder, blocks in self.held.items() if blocks}

    # -- index ----------------------------------------------------------------------------------------------------

    def may_insert(self, tokens, blocks):
        """Whether each block is given once, and those to be cached are cached nowhere yet."""
        path, cached = self.index.prefixes(tokens), set(self.index.blocks.values())
        new = [b for b, prefix in zip(blocks, path, strict=True) if prefix not in self.index.blocks]
        return len(set(blocks)) == len(blocks) and not cached & set(new)

    def insert(self, holder, tokens, blocks):
        """The canonical blocks: those cached first, but the caller's where that one is in HBM and theirs in DRAM."""
        cached = set(self.index.blocks.values())
        canonical = self.index.insert(tokens, blocks)
        for i, prefix in enumerate(self.index.prefixes(tokens)):
            if canonical[i].medium is DRAM and blocks[i].medium is HBM and blocks[i] not in cached:
                old, canonical[i] = canonical[i], blocks[i]
                self.index.blocks[prefix] = blocks[i]
                self._follow(old, blocks[i])
                self.bury([old])
        self.take(holder, canonical)
        return canonical

    # -- room and moves -------------------------------------------------------------------------------------------

    def room_for(self, num_blocks, medium):
        """Makes room as alloc_mem has to; whether `num_blocks` are free then."""
        if num_blocks > self.available(medium):
            self.end_swaps(self.open_swaps)
        if num_blocks > self.available(medium):
            return False
        while (short := num_blocks - self.free(medium)) > 0:
            if self.end_swaps([swap for swap in self.open_swaps if swap.sources[0].medium is medium]):
                continue
            if medium is HBM and self.swap_out(short):
                continue
            if not self._evict(short, medium) and not self.end_swaps(self.open_swaps):
                return False
        return True

    def _evict(self, num_blocks, medium):
        """Drops cached blocks: to make room in DRAM its own, as far as nothing in HBM continues them."""
        gone = medium is DRAM and self.index.evict(num_blocks, lambda block: block.medium is DRAM)
        gone = gone or self.index.evict(num_blocks)
        self.num_evicted += len(gone)
        self.bury(gone)
        return gone

    def _leaving(self, num_blocks):
        """The cached blocks that eviction would take first, as far as DRAM has room; in that order."""
        return self.index.coldest(min(num_blocks, self.free(DRAM)), lambda block: block.medium is HBM)

    def swap_out(self, num_blocks):
        """Moves them at once."""
        moved = self._leaving(num_blocks)
        self.num_swaps += bool(moved)
        self.num_swapped_out += len(moved)
        self.dead += [block.addr for block in moved if block.addr is not None]
        for block in moved:
            block.medium, block.addr = DRAM, None
        return moved

    def swap_in(self, holder, blocks):
        """The holder's blocks as they are then: copies in HBM of those in DRAM. None where there is no room."""
        below = [block for block in blocks if block.medium is DRAM]
        if not self.room_for(len(below), HBM):
            return None
        self.num_swaps += bool(below)
        self.num_swapped_in += len(below)
        return self._moved(holder, blocks, below, HBM)

    def begin_swap_out(self, num_blocks):
        """An open swap; None where nothing is to be moved."""
        return self._begin(self._leaving(num_blocks), DRAM, ("index",), [])

    def begin_swap_in(self, holder, blocks):
        """The same of a holder's blocks in DRAM; False where there is no room."""
        below = [block for block in blocks if block.medium is DRAM]
        return self.room_for(len(below), HBM) and self._begin(below, HBM, holder, blocks)

    def _begin(self, sources, medium, holder, blocks):
        if not sources:
            return None
        swap = OpenSwap(self.num_swaps, sources, [Block(medium, None) for _ in sources], holder, blocks)
        self.num_swaps += 1
        self.take(swap.holders[0], [*swap.targets, *sources])
        self.open_swaps.append(swap)
        return swap

    def are_coming(self, blocks):
        """Whether any of them is on its way to HBM."""
        return any(b in s.sources for s in self.open_swaps for b in blocks if b.medium is DRAM)

    def end_swaps(self, swaps):
        """Who wants the blocks has the new ones; whether there were any swaps."""
        ended = list(swaps)
        for swap in ended:
            self._end(swap)
        return bool(ended)

    def _end(self, swap):
        self.open_swaps.remove(swap)
        swap.is_open, (name, holder) = False, swap.holders
        counts, prefix_of = self.refcounts(), {block: prefix for prefix, block in self.index.blocks.items()}
        moved, new_place = [], {}
        for old, new in zip(swap.sources, swap.targets, strict=True):
            wanted = counts[old] == 2 if holder == ("index",) else True  # who uses it meanwhile keeps it there
            if old in prefix_of and wanted:
                self.index.blocks[prefix_of[old]] = new
                self._follow(old, new)
            if wanted and (old in prefix_of if holder == ("index",) else old in self.mine(holder)):
                new_place[old] = new
            if self.index.blocks.get(prefix_of.get(old)) is new or old in new_place:
                new.kv = old.kv
                moved.append(new)
        if holder != ("index",):
            self.take(holder, new_place.values())
            self.drop(holder, new_place)
        self.drop(name, [*swap.targets, *swap.sources])
        self.num_swapped_out += len(moved) if swap.targets[0].medium is DRAM else 0
        self.num_swapped_in += len(moved) if swap.targets[0].medium is HBM else 0
        here = [new_place.get(block, block) for block in swap.blocks or new_place]
        left = [block for block in here if holder == ("index",) or block in self.mine(holder)]
        swap.failed, swap.addrs = len(left) < len(here), [block.addr for block in left]

    def move_out(self, holder, blocks):
        """As a request's preemption: those in HBM that no other request uses lie in DRAM then. None: no room."""
        others = {b for other, held in self.held.items() if other != holder for b in held}
        alone = [block for block in blocks if block.medium is HBM and block not in others]
        if not self.room_for(len(alone), DRAM):
            return None
        self.num_swaps += bool(alone)
        self.num_swapped_out += len(alone)
        return self._moved(holder, blocks, alone, DRAM)

    def _follow(self, old, new):
        """Tickets under way that hold a block hold its copy too, once the index has that in its place."""
        for holder in [holder for holder, blocks in self.held.items() if old in blocks]:
            if holder[0] in ("transfer", "quarantine") and holder not in self.settled:
                self.take(holder, [new])

    def _moved(self, holder, blocks, leaving, medium):
        """`blocks`, with copies in `medium` of those `leaving`; the holder and the index have the copies then."""
        copies = {block: Block(medium, block.kv) for block in leaving}
        self.take(holder, copies.values())
        prefix_of = {block: prefix for prefix, block in self.index.blocks.items()}
        for block, copy in copies.items():
            if block in prefix_of:
                self.index.blocks[prefix_of[block]] = copy
                self._follow(block, copy)
        self.drop(holder, leaving)
        return [copies.get(block, block) for block in blocks]
