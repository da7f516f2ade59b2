"""Named outcomes of the KV cache. ValueError is for bad arguments; these are things that a caller handles by name."""


class OutOfBlocks(Exception):
    """Fewer blocks are free or evictable than asked for. Nothing was allocated; what was only cached may have moved or
    gone on the way, where some of it turned out to lie above blocks in use.
    """


class StaleAddress(Exception):
    """An address whose block was freed since, or that belongs to another instance or pool."""


class NotHeld(Exception):
    """A holder gave back a block that it does not hold: a double free, or somebody else's block."""


class MissedEvents(Exception):
    """An index's follower got an event too far ahead: some were lost. It needs a snapshot; nothing was changed."""


class BrokenInvariant(AssertionError):
    """`check()` found the books wrong. Always a bug in memserve."""
