"""What messages between two pools must do to the blocks of whoever gets them, spelled out in the blocks of the model.

It reads messages and time only, never a pool's own tickets: a block is held from the grant until its writer is known to
have stopped, and is cached when the sender has said Done and not before.
"""

from dataclasses import dataclass, field

from kvcache.pool_model import HBM
from kvcache.pool_pair import BLOCK_SIZE

from memserve.kvcache import Medium
from memserve.messages import unpack_times, unpack_tokens


@dataclass
class Entry:
    """A ticket under which somebody writes here. state: waiting, granted, quarantined, or done: it was published.

    kv: what the sender's blocks read as.  num_held: of `blocks`, those that were here before.
    """

    ask: object
    kv: list
    state: str = "waiting"
    blocks: list = field(default_factory=list)
    num_held: int = 0
    deadline_ns: int = 0

    @property
    def holder(self):
        return ("quarantine" if self.state == "quarantined" else "transfer", *self.ask.ticket)

    @property
    def tokens(self):
        return unpack_tokens(self.ask.tokens).tolist()


class Receiver:
    """One pool's model as the end that is written to.

    entries: ticket -> Entry, in the order of their Asks.  over: tickets that have ended here, and reservations that
    were given up.  published: tickets whose KV came to be seen.
    """

    def __init__(self, model, deadline_ns):
        self.model, self._deadline_ns = model, deadline_ns
        self.entries, self.over, self.published = {}, set(), set()

    def take(self, message, kv, now_ns):
        """A message was delivered. kv: of the ticket's blocks at the sender."""
        getattr(self, f"on_{type(message).__name__.lower()}", self._nothing)(message, kv, now_ns)

    def let_time_pass(self, now_ns):
        """Deadlines, then whoever waits and fits by now, first come first served."""
        for entry in self.entries.values():
            if entry.state == "granted" and now_ns >= entry.deadline_ns:
                self._quarantine(entry)
        for entry in self.entries.values():
            if entry.state == "waiting" and not self._grant(entry, now_ns):
                return

    def settle(self, ticket, heir, keep):
        """An arrival was taken: the ticket lets go, unless it is to `keep`; heir: who holds it all from now on."""
        entry = self.entries.pop(ticket)
        self.over.add(ticket)
        held = self.model.mine(entry.holder)
        if heir is not None:
            self.model.take(heir, held)
        if keep:
            self.model.settled.add(entry.holder)
        else:
            self.model.drop(entry.holder, held)

    def _nothing(self, message, kv, now_ns):
        """A message to the sender changes nothing here."""

    def on_ask(self, ask, kv, now_ns):
        if ask.ticket in self.entries or ask.ticket in self.over:
            return
        entry = Entry(ask, kv)
        fits = ask.num_blocks <= self.model.sizes[Medium(ask.medium)] and self._targets(ask) is not None
        waits = any(other.state == "waiting" for other in self.entries.values())
        granted = fits and (ask.best_effort or ask.addrs or not waits) and self._grant(entry, now_ns)
        if granted or (fits and not ask.best_effort):
            self.entries[ask.ticket] = entry
        else:
            self.over.add(ask.ticket)

    def _grant(self, entry, now_ns):
        """Holds what is cached and new blocks for the rest; or the blocks that the sender has reserved."""
        model, ask = self.model, entry.ask
        entry.blocks = self._targets(ask)
        if not ask.addrs:
            found = model.index.match(entry.tokens) if ask.insert else []
            model.take(entry.holder, found)
            missing, medium = ask.num_blocks - len(found), Medium(ask.medium)
            waits = medium is HBM and not ask.best_effort  # for swaps to end by themselves
            if (waits and missing > model.available(HBM)) or not model.room_for(missing, medium):
                model.drop(entry.holder, found)
                return False
            new = model.alloc(entry.holder, [None] * missing, medium)
            entry.blocks, entry.num_held = [*found, *new], len(found)
        model.take(entry.holder, entry.blocks)
        for block in entry.blocks[entry.num_held :]:
            block.kv = None
        entry.state, entry.deadline_ns = "granted", now_ns + self._deadline_ns
        return True

    def _targets(self, ask):
        """The blocks of an Ask that names them, none for one that does not; None if the sender has not got them."""
        theirs = {
            b.addr: b for h, blocks in self.model.held.items() if h[:2] == ("remote", ask.ticket[0]) for b in blocks
        }
        addrs = unpack_times(ask.addrs).tolist()
        return [theirs[addr] for addr in addrs] if set(addrs) <= set(theirs) else None

    def on_done(self, message, kv, now_ns):
        entry = self.entries.get(message.ticket)
        if entry is None or entry.state in ("waiting", "done"):
            return
        if entry.state == "quarantined":
            self._let_go(entry)
            return
        for block, number in zip(entry.blocks[entry.num_held :], entry.kv[entry.num_held :], strict=True):
            block.kv = number
        entry.state = "done"
        self.published.add(message.ticket)
        if entry.ask.insert:
            num_full = len(entry.tokens) // BLOCK_SIZE
            self.model.insert(entry.holder, entry.tokens[: num_full * BLOCK_SIZE], entry.blocks[:num_full])

    def on_abandon(self, message, kv, now_ns):
        entry = self.entries.get(message.ticket)
        if entry is not None and entry.state == "waiting":
            self._let_go(entry)
        elif entry is not None and entry.state == "granted":
            self._quarantine(entry)
        elif entry is None:
            self.over.add(message.ticket)  # its Ask may come yet

    def on_abortack(self, message, kv, now_ns):
        entry = self.entries.get(message.ticket)
        if entry is not None and entry.state in ("granted", "quarantined"):
            self._let_go(entry)
        elif entry is None:
            self.over.add(message.ticket)

    def _quarantine(self, entry):
        held = self.model.held.pop(entry.holder, [])
        entry.state = "quarantined"
        self.model.take(entry.holder, held)

    def _let_go(self, entry):
        self.model.drop(entry.holder, self.model.mine(entry.holder))
        del self.entries[entry.ask.ticket]
        self.over.add(entry.ask.ticket)

    # -- reservations ---------------------------------------------------------------------------------------------

    def on_reserve(self, message, kv, now_ns):
        holder = ("remote", *message.ticket)
        if message.ticket in self.over or holder in self.model.held:
            return
        if self.model.room_for(message.num_blocks, Medium(message.medium)):
            self.model.alloc(holder, [None] * message.num_blocks, Medium(message.medium))
        else:
            self.over.add(message.ticket)

    def on_release(self, message, kv, now_ns):
        holder = ("remote", *message.ticket)
        named = set(unpack_times(message.addrs).tolist())
        held = self.model.mine(holder)
        gone = [block for block in held if message.all or block.addr in named]
        self.model.drop(holder, gone)
        if len(gone) == len(held):
            self.over.add(message.ticket)
