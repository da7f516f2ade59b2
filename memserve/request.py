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

from memserve.sampling_params import SamplingParams
from memserve.values import require_int

Output = TypeVar("Output")


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
    """Computes batches, and moves no request's borders. forward_by_layer: yields each layer that all KV is in.
    num_near_ties: of its tokens so far, those that rounding alone might have chosen; None: nobody counts them.
    """

    @property
    def num_near_ties(self) -> int | None: ...

    def forward(self, batch: ScheduledBatch) -> StepOutput: ...

    def forward_by_layer(self, batch: ScheduledBatch) -> Generator[int, None, StepOutput]: ...
