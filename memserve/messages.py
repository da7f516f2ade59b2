"""Every message that crosses between client, global scheduler and instances, typed. Knows nobody who sends them.

| message    | from -> to                             | meaning                                                      |
|------------|----------------------------------------|--------------------------------------------------------------|
| `Submit`   | client -> global scheduler             | a new request                                                |
| `Cancel`   | client -> global scheduler             | the client no longer wants the answer                        |
| `Dispatch` | global scheduler -> instance           | serve this attempt                                           |
| `Abort`    | global scheduler -> instance           | stop this attempt and free what it holds                     |
| `Tokens`   | instance -> global scheduler -> client | new tokens, with the time of each                            |
| `Finished` | instance -> global scheduler -> client | the attempt ended, with its reason, counts and event times   |
| `HandoffEnded` | instance -> global scheduler       | the attempt's KV has reached whom it was for, or not         |
| `Inherited` | instance -> global scheduler          | another instance has left KV to this one                     |
| `Room`     | instance -> global scheduler           | a request has come, gone or been preempted; how much is free |
| `Redirect` | global scheduler -> instance           | hand the attempt to another instance, once it decodes        |
| `Ask`      | sending pool -> receiving pool         | room for blocks, and which prefix of the tokens is held      |
| `Grant`    | receiving pool -> sending pool         | where it goes, and what is held already                      |
| `Wait`     | receiving pool -> sending pool         | there is no room yet                                         |
| `Refuse`   | receiving pool -> sending pool         | there never will be                                          |
| `Done`     | sending pool -> receiving pool         | every byte is in place                                       |
| `Inserted` | receiving pool -> sending pool         | published; the sender's call completes                       |
| `Abandon`  | either pool -> the other               | the ticket has failed                                        |
| `AbortAck` | sending pool -> receiving pool         | nothing more will be written under this ticket               |
| `Reserve`  | a pool -> another                      | allocate blocks there, to be written later                   |
| `Reserved` | that pool -> the first                 | where they are                                               |
| `Release`  | the first pool -> the other            | free them                                                    |
| `Released` | the other pool -> the first            | they are free                                                |
| `Fetch`    | an instance -> one that holds more     | send what you hold of this prefix; a transfer or `Refuse`    |

Token ids travel as little-endian int32 bytes and times as int64 bytes, so that a message means the same in every
process and no list of Python integers is built on the way.
"""

import msgspec
import numpy as np

from memserve.decisions import Holding
from memserve.request import FinishReason, TokenLogprobs
from memserve.request_stats import RequestStats
from memserve.sampling_params import SamplingParams


class Submit(msgspec.Struct, frozen=True, tag=True):
    """A client's request. class_name: of the workload's class that it is of, for the report; "" of none."""

    request_id: str
    session_id: str
    tokens: bytes
    params: SamplingParams
    arrival_ns: int
    priority: int = 0
    class_name: str = ""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class Dispatch(msgspec.Struct, frozen=True, tag=True):
    """held_elsewhere: who else may hold more of the prompt than the instance that is chosen (Eq. 2)."""

    request_id: str
    attempt: int
    session_id: str
    tokens: bytes
    params: SamplingParams
    arrival_ns: int
    decode: int | None = None  # incarnation of the decode instance, for a prefill instance
    held_elsewhere: tuple[Holding, ...] = ()
    priority: int = 0


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


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The end of an attempt. `detail` names the cause when the reason is a failure."""

    request_id: str
    attempt: int
    reason: FinishReason
    detail: str
    stats: RequestStats | None


CANCELLED = (FinishReason.ABORTED, "cancelled by the client")


class HandoffEnded(msgspec.Struct, frozen=True, tag=True):
    """`instance`: who had the KV, and keeps it unless `done`. `refused`: whoever was asked has not taken it and never
    will. num_tokens: whose KV it was; 0 if the request went on meanwhile.  num_ahead: of these, those whose KV was sent
    before it stopped.
    """

    request_id: str
    attempt: int
    instance: str
    done: bool
    refused: bool = False
    reason: str = ""
    num_tokens: int = 0
    num_ahead: int = 0


class Inherited(msgspec.Struct, frozen=True, tag=True):
    """The KV of these tokens, which another instance has left to this one, is cached here from now on."""

    instance: str
    tokens: bytes


class Room(msgspec.Struct, frozen=True, tag=True):
    """Blocks of an instance's HBM that no request or transfer holds (free, or cached alone), and all of them."""

    num_free: int
    num_blocks: int


class Redirect(msgspec.Struct, frozen=True, tag=True):
    """decode: an incarnation; its own tells an instance to go on with what it was to hand over."""

    request_id: str
    attempt: int
    decode: int


class Geometry(msgspec.Struct, frozen=True):
    """What both ends of a transfer must agree on."""

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    layout: str


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Room for num_blocks blocks that hold the KV of `tokens`, in `medium`.

    ticket: (incarnation of the sender, its number there), as in every message between pools.  insert: the receiver
    indexes the whole blocks.  best_effort: decline instead of waiting.  pinned: keep the blocks after insertion until
    they are freed by name.  private: carried for the user, untouched.  addrs: int64 bytes, where it goes if the sender
    has reserved that before; then it is written already and no Grant is waited for.
    """

    ticket: tuple[int, int]
    tokens: bytes
    num_blocks: int
    medium: int
    insert: bool
    best_effort: bool
    pinned: bool
    private: bytes
    geometry: Geometry
    addrs: bytes = b""


class PoolSize(msgspec.Struct, frozen=True):
    """What a writer needs to know of a pool: its blocks, and over how many ranks the KV heads of each are split."""

    num_hbm_blocks: int
    num_dram_blocks: int
    num_ranks: int = 1


class Grant(msgspec.Struct, frozen=True, tag=True):
    """addrs: int64 bytes, where the last blocks go; the first num_held tokens, whole blocks, are held already.

    pool: the receiver's.
    """

    ticket: tuple[int, int]
    addrs: bytes
    num_held: int
    pool: PoolSize


class Wait(msgspec.Struct, frozen=True, tag=True):
    ticket: tuple[int, int]


class Refuse(msgspec.Struct, frozen=True, tag=True):
    ticket: tuple[int, int]
    reason: str


class Done(msgspec.Struct, frozen=True, tag=True):
    """`private` is the Ask's, or what the sender knew better by now.

    arrived_ns: when the last byte was in place, on the cluster's clock; where none had to move, when the sender knew.
    """

    ticket: tuple[int, int]
    private: bytes
    arrived_ns: int


class Inserted(msgspec.Struct, frozen=True, tag=True):
    ticket: tuple[int, int]


class Abandon(msgspec.Struct, frozen=True, tag=True):
    ticket: tuple[int, int]
    reason: str


class AbortAck(msgspec.Struct, frozen=True, tag=True):
    ticket: tuple[int, int]


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """geometry: of the blocks that will be written there."""

    ticket: tuple[int, int]
    num_blocks: int
    medium: int
    geometry: Geometry


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """addrs: int64 bytes.  pool: that they are in."""

    ticket: tuple[int, int]
    addrs: bytes
    pool: PoolSize


class Release(msgspec.Struct, frozen=True, tag=True):
    """addrs: int64 bytes, of the reservation `ticket`.  all: the whole of it, and what may still be asked for."""

    ticket: tuple[int, int]
    addrs: bytes
    all: bool


class Released(msgspec.Struct, frozen=True, tag=True):
    """As the `Release` that it answers."""

    ticket: tuple[int, int]
    addrs: bytes
    all: bool


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Send the KV of `tokens`, up to `limit` of them, of which the first num_held are here already.

    ticket: (incarnation of who asks, its number there, below 0); the transfer that answers has one of its own.
    """

    ticket: tuple[int, int]
    tokens: bytes
    limit: int
    num_held: int


PoolMessage = (
    Ask | Grant | Wait | Refuse | Done | Inserted | Abandon | AbortAck | Reserve | Reserved | Release | Released | Fetch
)
Message = (
    Submit | Cancel | Dispatch | Abort | Tokens | Finished | HandoffEnded | Inherited | Room | Redirect | PoolMessage
)


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
