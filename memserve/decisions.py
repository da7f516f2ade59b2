"""Decisions: who is taken to hold what, and whether it was fetched or computed (Eq. 2), as numbers that can travel."""

import msgspec


class Holding(msgspec.Struct, frozen=True):
    """The first num_tokens tokens of a prompt are taken to be cached on an instance (its incarnation)."""

    instance: int
    num_tokens: int


class FetchRecord(msgspec.Struct, frozen=True):
    """One decision of Eq. 2. Tokens found here and usable there; seconds predicted for all num_in_batch requests that
    were decided at once: until the KV has come, and by which prefilling takes longer without it.

    outcome: computed, fetched, refused or failed; the last two were computed too, for `reason`.
    """

    holder: int
    num_cached: int
    num_held: int
    num_in_batch: int
    fetch_s: float
    compute_s: float
    chose_fetch: bool
    began_ns: int
    ended_ns: int | None = None
    outcome: str = "computed"
    reason: str = ""
    num_fetched: int = 0
