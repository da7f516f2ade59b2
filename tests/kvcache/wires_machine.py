"""What callers do with two pools that move KV to each other, in any order and at any moment of the protocol.

When a sequence is over nobody does anything any more and nothing is lost: everything ends, and every block is free.
"""

from hypothesis import strategies as st
from hypothesis.stateful import rule
from kvcache.pool_machine import chosen, counts, holders, masks, prompts
from kvcache.pool_model import DRAM, HBM
from kvcache.pool_pair import BLOCK_SIZE, NUM_BLOCKS, addrs_of, as_addrs, refused
from kvcache.pool_wires import TIMEOUTS, PoolWires, Reservation, Sent

from memserve.kvcache import StaleAddress, TransferOptions

picks = st.integers(0, 99)
media = st.sampled_from([HBM, HBM, DRAM])
options = st.builds(TransferOptions, medium=media, best_effort=st.booleans(), pinned=st.booleans())
events = st.lists(st.sampled_from(
    ["delivered"] * 12 + ["lost", "repeated", "overtaken", "a move", "a move", "a retry", "a retry", "a deadline",
     "patience", "cancelled", "stalled", "settled", "freed", "freed", "given up", "deleted", "evicted", "room made"]
), min_size=2, max_size=16)  # fmt: skip
ways = st.lists(st.sampled_from(["on demand", "reserved", "unseen"]), max_size=3)


class WiresMachine(PoolWires):
    """What callers do with another pool."""

    @rule(holder=holders, mask=masks, flags=options)
    def transfer(self, holder, mask, flags):
        if blocks := chosen([b for b in self.model.mine(holder) if b.kv is not None], mask):
            self.started(blocks, self.pool.transfer(self.there, addrs_of(blocks), flags=flags))

    @rule(tokens=prompts, cut=st.integers(0, BLOCK_SIZE - 1), flags=options)
    def transfer_with_insert(self, tokens, cut, flags):
        """What is cached of a prompt, of its last block a part."""
        if found := self.matched(tokens):
            known, addrs = tokens[: len(found) * BLOCK_SIZE - cut], addrs_of(found)
            self.started(found, self.pool.transfer_with_insert(self.there, known, addrs, flags=flags))

    @rule(tokens=prompts, pick=picks, insert=st.booleans())
    def transfer_to_reserved(self, tokens, pick, insert):
        """What is cached, to addresses of a reservation; refused where an earlier transfer may have cached them."""
        mine = [r for r in self.reservations if r.owner == self.here]
        if not mine or not (found := self.matched(tokens)):
            return
        reservation = mine[pick % len(mine)]
        targets = [a for a in reservation.addrs if a not in reservation.used or reservation.used[a].state == "done"]
        if not (targets := targets[: len(found)]):
            return
        found = found[: len(targets)]
        src_addrs, dst_addrs, known = addrs_of(found), as_addrs(targets), tokens[: len(found) * BLOCK_SIZE]

        def call():
            if insert:
                return self.pool.transfer_with_insert(self.there, known, src_addrs, dst_addrs)
            return self.pool.transfer(self.there, src_addrs, dst_addrs)

        if reservation.inserted & set(targets):
            refused(ValueError, call)
            return
        for block in self.sides[self.there].model.mine(("remote", *reservation.ticket.ticket_id)):
            block.kv = None if block.addr in targets else block.kv
        ticket = call()
        reservation.inserted |= set(targets) if insert else set()
        reservation.used |= dict.fromkeys(targets, ticket)
        self.started(found, ticket, targets)

    def started(self, blocks, ticket, targets=()):
        sent = Sent(ticket, self.here, [block.kv for block in blocks], set(targets))
        self.sent[ticket.ticket_id] = self.writing[ticket.ticket_id] = sent
        self.model.take(("transfer", *ticket.ticket_id), blocks)
        self.listen(self.here)

    @rule(pick=picks)
    def cancel(self, pick):
        if mine := [sent for sent in self.writing.values() if sent.sender == self.here]:
            self.pool.transfers.cancel(mine[pick % len(mine)].ticket, "given up", self.now_ns)
            self.listen(self.here)

    @rule(holder=holders, count=counts, medium=media)
    def reserve(self, holder, count, medium):
        ticket = self.pool.alloc_mem(count, medium, instance=self.there, holder=holder)
        self.asked_for.append(Reservation(ticket, self.here, holder))
        self.listen(self.here)

    @rule(pick=picks, mask=masks)
    def free_reserved(self, pick, mask):
        """Some of a reservation; refused while somebody writes there, and for anybody else."""
        mine = [r for r in self.reservations if r.owner == self.here]
        if not mine or not (gone := chosen(mine[pick % len(mine)].addrs, mask)):
            return
        reservation, addrs = mine[pick % len(mine)], as_addrs(gone)
        refused((StaleAddress, ValueError), lambda: self.pool.free_mem(addrs, holder=("request", "nobody", 0)))
        if any(sent.targets & set(gone) for sent in self.writing.values()):
            refused(ValueError, lambda: self.pool.free_mem(addrs, holder=reservation.holder))
            return
        self.pool.free_mem(addrs, holder=reservation.holder)
        reservation.addrs = [addr for addr in reservation.addrs if addr not in gone]
        self.listen(self.here)

    @rule(pick=picks, heir=st.none() | holders)
    def settle(self, pick, heir):
        if self.arrivals:
            number, arrival = self.arrivals.pop(pick % len(self.arrivals))
            receiver = self.receivers[number]
            holder = ("transfer", *arrival.ticket_id)
            taken = set(receiver.model.mine(heir)) & set(receiver.model.mine(holder))
            heir, keep = None if taken else heir, receiver.entries[arrival.ticket_id].ask.pinned
            self.sides[number].pool.transfers.settle(arrival, heir)
            receiver.settle(arrival.ticket_id, heir, keep)
            self.pinned += [(number, holder)] if keep else []
            self.touched.add(number)

    @rule(pick=picks)
    def free_pinned(self, pick):
        if self.pinned:
            number, holder = self.pinned.pop(pick % len(self.pinned))
            blocks = self.sides[number].model.mine(holder)
            self.sides[number].pool.free_mem(addrs_of(blocks), holder=holder)
            self.sides[number].model.drop(holder, blocks)
            self.touched.add(number)

    @rule(holder=holders, tokens=prompts, ways=ways, flags=options, several=events, pick=picks)
    def converse(self, holder, tokens, ways, flags, several, pick):
        """Something to send, sent in some ways at once, and what may happen until it is there."""
        self.compute_and_insert(holder, tokens, "as it lies")
        if "reserved" in ways:
            self.reserve(holder, 1 + pick % 4, flags.medium)
            self.let_all_go_well()
        for way in ways:
            if way == "on demand":
                self.transfer_with_insert(tokens, pick % BLOCK_SIZE, flags)
            elif way == "reserved":
                self.transfer_to_reserved(tokens, pick, insert=flags.best_effort)
            else:
                self.transfer(holder, pick, flags)
        for event in several:
            self.happens(event, holder, tokens, pick)

    def happens(self, event, holder, tokens, pick):
        """One of `events`."""
        waits_ns = {"a move": 2_000, "a retry": TIMEOUTS.retry_ns, "a deadline": TIMEOUTS.deadline_ns,
                    "patience": TIMEOUTS.patience_ns}  # fmt: skip
        if event in waits_ns:
            self.let_time_pass(waits_ns[event])
        elif event == "cancelled":
            self.cancel(pick)
        elif event == "stalled":
            self.stall(3 * TIMEOUTS.deadline_ns)
        elif event == "settled":
            self.settle(pick, holder)
        elif event == "freed":
            self.free_reserved(pick, 0)
        elif event == "given up":
            self.abort(holder)
        elif event == "deleted":
            self.delete_everywhere(tokens)
        elif event in ("evicted", "room made"):
            self.face_the_other_pool()
            self.try_alloc(holder, 1 + pick % NUM_BLOCKS, DRAM if event == "evicted" else HBM)
            self.abort(holder)
            self.face_the_other_pool()
        else:
            self.deliver([event])

    def delete_everywhere(self, tokens):
        for _ in self.sides:
            self.delete(tokens)
            self.face_the_other_pool()

    def teardown(self):
        """When nobody does anything any more, and nothing is lost, everything ends and every block is free."""
        if not hasattr(self, "sides"):
            return
        for side in self.sides.values():
            side.pool.blocks.wait()
            side.model.end_swaps(side.model.open_swaps)
            for holder in [h for h in side.model.held if h[0] == "request"]:
                side.pool.blocks.release_all(holder)
                side.model.drop(holder, side.model.mine(holder))
        for _ in range(100):
            self.let_all_go_well()
            self._give_back_everything()
            if not self.said and not any(side.pool.transfers.num_open for side in self.sides.values()):
                break
        for side in self.sides.values():
            side.check()
            side.pool.blocks.clear()
            stats = side.pool.stats()
            assert (stats.num_free, stats.num_free_dram) == (stats.num_blocks, stats.num_dram_blocks), "a block leaked"
            assert side.pool.transfers.num_open == side.pool.transfers.num_quarantined == 0, "a ticket never ended"

    def _give_back_everything(self):
        while self.arrivals:
            self.settle(0, None)
        while self.pinned:
            self.free_pinned(0)
        for reservation in self.reservations:
            self.here, self.there = reservation.owner, 7 - reservation.owner
            self.free_reserved([r for r in self.reservations if r.owner == self.here].index(reservation), 0)
