"""Every message that crosses between client, global scheduler and instances, typed. Knows nobody who sends them.

| message    | from -> to                             | meaning                                                      |
|------------|----------------------------------------|--------------------------------------------------------------|
| `Submit`   | client -> global scheduler             | a new request                                                |
| `Cancel`   | client -> global scheduler             | the client no longer wants the answer                        |
| `Dispatch` | global scheduler -> instance           | serve this attempt                                           |
| `Abort`    | global scheduler -> instance           | stop this attempt and free what it holds                     |
| `Tokens`   | instance -> global scheduler -> client | new tokens, with the time of each                            |
| `Finished` | instance -> global scheduler -> client | the attempt ended, with its reason, counts and event times   |

Token ids travel as little-endian int32 bytes and times as int64 bytes, so that a message means the same in every
process and no list of Python integers is built on the way.
"""

import msgspec
import numpy as np

from memserve.request import FinishReason, SamplingParams, TokenLogprobs


class Submit(msgspec.Struct, frozen=True, tag=True):
    """A client's request."""

    request_id: str
    session_id: str
    tokens: bytes
    params: SamplingParams
    arrival_ns: int


class Cancel(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class Dispatch(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    attempt: int
    session_id: str
    tokens: bytes
    params: SamplingParams
    arrival_ns: int


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    attempt: int


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """Generated tokens [index, index + n) of a request, and when each left the instance."""

    request_id: str
    attempt: int
    index: int
    token_ids: bytes
    times_ns: bytes
    logprobs: list[TokenLogprobs] | None = None


class RequestStats(msgspec.Struct, frozen=True):
    """What an instance counted for one attempt. Token counts; times in nanoseconds on the cluster's clock.

    num_cached_local: prompt tokens found in the instance's own index at first admission. num_computed: tokens
    prefilled, those computed again after a preemption included.
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


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The end of an attempt. `detail` names the cause when the reason is a failure."""

    request_id: str
    attempt: int
    reason: FinishReason
    detail: str
    stats: RequestStats | None


Message = Submit | Cancel | Dispatch | Abort | Tokens | Finished


def pack_tokens(tokens: np.ndarray) -> bytes:
    """int32 [n] -> little-endian bytes."""
    return np.ascontiguousarray(tokens, dtype="<i4").tobytes()


def unpack_tokens(data: bytes) -> np.ndarray:
    """Little-endian bytes -> int32 [n], read-only."""
    return np.frombuffer(data, dtype="<i4")


def pack_times(times_ns: np.ndarray) -> bytes:
    """int64 [n] -> little-endian bytes."""
    return np.ascontiguousarray(times_ns, dtype="<i8").tobytes()


def unpack_times(data: bytes) -> np.ndarray:
    """Little-endian bytes -> int64 [n], read-only."""
    return np.frombuffer(data, dtype="<i8")
