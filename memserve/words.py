"""Words: what travels beside KV, as msgpack, for whoever receives it. Knows requests and fetches; moves nothing.

`HandedOver` brings a request, `GivenBack` what was generated for one, `FetchedKV` (fetches.py) what was asked for,
`Bequeathed` (bequest.py) what an instance that leaves has cached, `Deposited` (deposits.py) what a store is to keep,
`SentAhead` (migrations.py) what an answer brings along that is still decoded elsewhere.
"""

import msgspec

from memserve.bequest import Bequeathed
from memserve.deposits import Deposited
from memserve.fetches import FetchedKV
from memserve.messages import pack_tokens, unpack_tokens
from memserve.migrations import SentAhead
from memserve.request import Request
from memserve.request_stats import RequestStats
from memserve.sampling_params import SamplingParams
from memserve.sched.queue_policy import QueuePolicy, level_of


class HandedOver(msgspec.Struct, frozen=True, tag=True):
    """A request that goes on at the receiver. tokens: int32 bytes, prompt and what was generated; the KV of the last is
    still to be computed.  stats: of it so far.  prefill: the instance that prefilled it, which may get KV back.
    migrates: it was decoded before, by the sender.
    """

    request_id: str
    attempt: int
    session_id: str
    arrival_ns: int
    priority: int
    params: SamplingParams
    seed: int
    num_prompt: int
    max_num_tokens: int
    tokens: bytes
    stats: RequestStats | None
    prefill: int | None
    migrates: bool


class GivenBack(msgspec.Struct, frozen=True, tag=True):
    """The KV of a finished request, for the instance that prefilled it."""

    session_id: str


Word = HandedOver | GivenBack | FetchedKV | Bequeathed | Deposited | SentAhead
_words: msgspec.msgpack.Decoder[Word] = msgspec.msgpack.Decoder(Word)


def read_word(data: bytes) -> Word:
    """What `packed` wrote, or another word."""
    return _words.decode(data)


def packed(request: Request, stats: RequestStats | None, prefill: int | None, *, migrates: bool) -> bytes:
    """The word that hands a request over."""
    r, tokens = request, pack_tokens(request.tokens.view)
    word = HandedOver(
        r.request_id, r.attempt, r.session_id, r.arrival_ns, r.priority, r.params, r.seed, r.num_prompt,
        r.max_num_tokens, tokens, stats, prefill, migrates,
    )  # fmt: skip
    return msgspec.msgpack.encode(word)


def request_of(word: HandedOver) -> Request:
    """The request as it was, without blocks: the KV of all but its last token is computed."""
    tokens = unpack_tokens(word.tokens)
    request = Request(
        word.request_id, tokens[: word.num_prompt], word.params, attempt=word.attempt, session_id=word.session_id,
        arrival_ns=word.arrival_ns, priority=word.priority, seed=word.seed, max_num_tokens=word.max_num_tokens,
    )  # fmt: skip
    request.tokens.extend(tokens[word.num_prompt :])
    request.num_computed = request.prefill_end = request.num_tokens - 1
    return request


def level_of_word(queue: QueuePolicy, data: bytes) -> float:
    """The level of a request that is handed over by a word; 0 of another word."""
    word = read_word(data)
    return level_of(queue, request_of(word)) if isinstance(word, HandedOver) else 0
