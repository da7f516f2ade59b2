"""RequestStats: what instances counted and when what happened, of one attempt to serve a request. Knows no message."""

import msgspec

from memserve.decisions import FetchRecord


class Stint(msgspec.Struct, frozen=True):
    """What an instance had done of an answer when it migrated to another. Tokens generated and prefilled there."""

    instance: str
    num_generated: int
    num_computed: int
    num_preemptions: int


class RequestStats(msgspec.Struct, frozen=True):
    """What an instance counted for one attempt. Token counts; times in nanoseconds on the cluster's clock.

    num_cached_local: prompt tokens found in the instance's own index at first admission; num_fetched: those that had
    come from another instance for this request. num_computed: tokens prefilled, those computed again after a preemption
    included; num_computed_on_decode: beside them, by instances that went on with it. num_preemptions_on_decode: of
    num_preemptions, there. decode_instance: who generated the last token, "" if the same. asked_ns: when the instance
    that it was handed to was asked for room; ask_read_ns, granted_ns: when that one read so, and had made room;
    arrived_ns: when the last byte of the KV was there; received_ns: when it read so, and published the KV;
    decode_scheduled_ns: when its first step began. fetch: what was decided about KV held elsewhere. fetch_end_ns: when
    the request waited for it no longer.
    stints: of instances that the answer has left, in order: it was decoded there before it migrated.
    """

    instance: str
    queued_ns: int
    first_scheduled_ns: int | None
    prefill_end_ns: int | None
    num_prompt: int
    num_cached_local: int
    num_computed: int
    num_generated: int
    num_preemptions: int
    num_fetched: int = 0
    num_computed_on_decode: int = 0
    decode_instance: str = ""
    asked_ns: int | None = None
    ask_read_ns: int | None = None
    granted_ns: int | None = None
    arrived_ns: int | None = None
    received_ns: int | None = None
    num_preemptions_on_decode: int = 0
    decode_scheduled_ns: int | None = None
    fetch: FetchRecord | None = None
    fetch_end_ns: int | None = None
    stints: tuple[Stint, ...] = ()
