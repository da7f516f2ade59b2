"""Request: one prompt on its way to its answer, and ScheduledBatch: what one step computes. Knows no tensor.

    # intervals of a request's KV, in tokens; every index below is one of these borders
    # [0, num_cached) reused | [num_cached, num_computed) computed here | [num_computed, num_tokens) to do
    # [0, num_prompt) prompt | [num_prompt, num_tokens) generated

Phases: WAITING -> RUNNING -> FINISHED, where KV is fetched FETCHING before; RUNNING -> WAITING by preemption;
WAITING -> SWAPPING_IN -> WAITING while KV comes from DRAM beside compute; RUNNING -> HANDING_OFF where it is to go on
at another instance, and -> WAITING again if nobody takes it; any -> FINISHED by abort.
"""

import enum
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import msgspec
import numpy as np

from memserve.values import as_tuple, require_bool, require_int, require_number

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_WORD = 2**64 - 1  # of what goes from one instance to another
Output = TypeVar("Output")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one answer are chosen. The defaults are greedy.

    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of tokens whose probability reaches it, in (0, 1].
    seed: the random number of a token is a function of (seed, position) alone; None takes the engine's seed and the
        request's id.
    max_tokens: most tokens to generate, at least 1.
    stop: strings that end the answer; the text ends before the first of them. One that is a special token of the
        tokenizer (`<|im_end|>`), which text leaves out, ends the answer at that token.
    stop_token_ids: tokens that end the answer, beside the model's end-of-sequence tokens.
    ignore_eos: do not end at the model's end-of-sequence tokens.
    logprobs: return the log-probability of each token and of this many most likely ones; None returns none.

    Raises ValueError naming the value and what is allowed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._set("stop", as_tuple("stop", self.stop))
        self._set("stop_token_ids", as_tuple("stop_token_ids", self.stop_token_ids))
        self._set("temperature", require_number("temperature", self.temperature, "a finite number >= 0", minimum=0.0))
        top_k = require_int("top_k", self.top_k, 0, MAX_WORD, allowed="an integer in [0, 2**64) (0 keeps all)")
        self._set("top_k", top_k)
        top_p = require_number("top_p", self.top_p, "a number in (0, 1]", minimum=0.0, maximum=1.0, exclusive=True)
        self._set("top_p", top_p)
        self._set("max_tokens", require_int("max_tokens", self.max_tokens, 1))
        if self.seed is not None:
            self._set("seed", require_int("seed", self.seed, 0, MAX_WORD, allowed="an integer in [0, 2**64) or None"))
        if self.logprobs is not None:
            allowed = f"an integer in [0, {MAX_LOGPROBS}] or None"
            self._set("logprobs", require_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, allowed=allowed))
        if len(self.stop) > MAX_STOP_STRINGS or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop={self.stop!r}: expected at most {MAX_STOP_STRINGS} non-empty strings")
        ids, allowed = self.stop_token_ids, "integers in [0, 2**64)"
        stop_ids = tuple(require_int("stop_token_ids", token, 0, MAX_WORD, allowed=allowed) for token in ids)
        self._set("stop_token_ids", stop_ids)
        require_bool("ignore_eos", self.ignore_eos)

    def _set(self, name: str, value: object) -> None:
        msgspec.structs.force_setattr(self, name, value)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def can_stop_early(self) -> bool:
        """Whether the answer may end before max_tokens, so that its length is not known in advance."""
        return bool(self.stop or self.stop_token_ids or not self.ignore_eos)


def require_priority(name: str, value: object) -> int:
    """`value` as a request's priority. Raises ValueError naming it where it is none."""
    return require_int(name, value, -(2**31), 2**31 - 1, allowed="an integer in [-2**31, 2**31), smaller ones first")


class Phase(enum.Enum):
    WAITING = "waiting"
    FETCHING = "fetching"
    SWAPPING_IN = "swapping in"
    RUNNING = "running"
    HANDING_OFF = "handing off"
    FINISHED = "finished"


class Role(enum.StrEnum):
    """What an instance does. COLOCATED prefills and decodes; a STORE serves no request, and keeps KV for who does."""

    COLOCATED = "colocated"
    PREFILL = "prefill"
    DECODE = "decode"
    STORE = "store"


TAKING = (Role.COLOCATED, Role.PREFILL)  # roles of instances that requests go to first
SERVING = (*TAKING, Role.DECODE)  # of all that they go to


class FinishReason(enum.StrEnum):
    """Why a request ended. STOP and LENGTH are answers; the others are named failures."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    REFUSED = "refused"
    TRANSFER_FAILED = "transfer_failed"
    INSTANCE_LOST = "instance_lost"

    @property
    def succeeded(self) -> bool:
        return self in (FinishReason.STOP, FinishReason.LENGTH)


class IntBuffer:
    """An append-only int32 array that grows by doubling; `view` is always C-contiguous."""

    def __init__(self, values: np.ndarray) -> None:
        self._data = np.array(values, dtype=np.int32).reshape(-1)
        self._size = self._data.size

    def __len__(self) -> int:
        return self._size

    @property
    def view(self) -> np.ndarray:
        """int32 [len]: valid until the next append."""
        return self._data[: self._size]

    def extend(self, values: np.ndarray) -> None:
        end = self._size + len(values)
        if end > self._data.size:
            grown = np.empty(max(end, 2 * self._data.size, 16), dtype=np.int32)
            grown[: self._size] = self.view
            self._data = grown
        self._data[self._size : end] = values
        self._size = end

    def append(self, value: int) -> None:
        if self._size == self._data.size:
            self.extend(np.array([value], dtype=np.int32))
        else:
            self._data[self._size] = value
            self._size += 1

    def truncate(self, size: int) -> None:
        """Forget everything from `size` on."""
        assert 0 <= size <= self._size
        self._size = size


@dataclass(eq=False)
class Request:
    """One request as an instance sees it. The local scheduler owns `block_table` and the borders.

    prompt: int32 [num_prompt] token ids.  block_table: int32 [num_blocks] block numbers, append-only while it runs.
    """

    request_id: str
    prompt: np.ndarray
    params: SamplingParams
    attempt: int = 0
    session_id: str = ""
    arrival_ns: int = 0
    priority: int = 0  # smaller is more urgent (vLLM's convention), where the queue looks at it
    seed: int = 0  # of its random numbers, unless params bring one; drawn by the instance from its own seed and the id
    phase: Phase = Phase.WAITING
    num_cached: int = 0
    num_computed: int = 0
    num_published: int = 0  # tokens whose blocks this attempt has entered into the index, or found there
    prefill_end: int = 0  # tokens it had when it was admitted: what is computed below this is prefill
    num_prefilled: int = 0  # prefill tokens computed, recomputed ones included
    max_num_tokens: int = 0  # prompt and answer together, as far as params and context allow
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    tokens: IntBuffer = field(init=False)
    block_table: IntBuffer = field(init=False)

    def __post_init__(self) -> None:
        if self.params.seed is not None:
            self.seed = self.params.seed
        self.tokens = IntBuffer(self.prompt)
        self.block_table = IntBuffer(np.empty(0, dtype=np.int32))

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def num_to_compute(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def output_token_ids(self) -> np.ndarray:
        """int32 [num_generated], a view."""
        return self.tokens.view[self.num_prompt :]

    @property
    def holder(self) -> tuple[str, str, int]:
        """The name under which this attempt holds blocks in its pool."""
        return ("request", self.request_id, self.attempt)


@dataclass(frozen=True)
class ScheduledBatch:
    """What one step computes: for request i, the tokens [num_computed, num_computed + num_new[i]).

    Blocks for those tokens are in the requests' block tables already. A request whose chunk reaches its last token
    (`samples`) gets a new token. `num_steps` > 1 (decode only, every num_new is 1) repeats the step that many times,
    each sampled token becoming the next input; the blocks cover all of them.
    `num_swapped_blocks` were moved between HBM and DRAM since the last batch, while this one waited.
    """

    requests: list[Request]
    num_new: list[int]
    num_steps: int = 1
    num_swapped_blocks: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the batch, all its steps together."""
        return sum(self.num_new) * self.num_steps

    @property
    def samples(self) -> list[bool]:
        """For each request, whether its chunk reaches its last token, so that a token is sampled."""
        return [r.num_computed + n == r.num_tokens for r, n in zip(self.requests, self.num_new, strict=True)]


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities (natural logarithm, of the model's unscaled softmax) at one generated token."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True)
class StepOutput:
    """What a runner returns for a ScheduledBatch.

    token_ids: int32 [num_requests, num_steps], -1 in the rows of requests that sampled nothing.
    logprobs: for each request a TokenLogprobs or None; None when no request asked for any.
    """

    token_ids: np.ndarray
    logprobs: list[TokenLogprobs | None] | None = None


class LayerRun(Generic[Output]):
    """A computation that yields each layer's number once its KV is written. `output`: what it came to, at its end."""

    output: Output

    def __init__(self, layers: Generator[int, None, Output]) -> None:
        self._layers = layers

    def __iter__(self) -> Iterator[int]:
        self.output = yield from self._layers

    def finish(self) -> Output:
        """Runs what is left of it."""
        for _ in self:
            pass
        return self.output


class Runner(Protocol):
    """Computes batches, and moves no request's borders. forward_by_layer: yields each layer that all KV is in."""

    def forward(self, batch: ScheduledBatch) -> StepOutput: ...

    def forward_by_layer(self, batch: ScheduledBatch) -> Generator[int, None, StepOutput]: ...
