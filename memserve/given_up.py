"""GivenUp: attempts to serve a request that were aborted while their KV may still be on its way here. Knows no block.

An abort and what takes its attempt's place come from different processes, so either may be here first.
"""

from memserve.latest import Latest
from memserve.served import Served
from memserve.words import HandedOver

NUM_REMEMBERED = 4096


class GivenUp:
    """One instance's; the latest NUM_REMEMBERED of them."""

    def __init__(self) -> None:
        self._attempts: Latest[tuple[str, int], None] = Latest(NUM_REMEMBERED)

    def note(self, request_id: str, attempt: int) -> None:
        """An attempt that is not here was aborted: should its KV still come, nobody wants it."""
        self._attempts[request_id, attempt] = None

    def has(self, word: HandedOver, here: Served | None) -> bool:
        """Whether an attempt that arrives was given up. here: the request as it is served here, if it is."""
        is_older = here is not None and word.attempt < here.request.attempt
        return is_older or (word.request_id, word.attempt) in self._attempts
