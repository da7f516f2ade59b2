"""LLM: one instance as a Python object, for notebooks and scripts. Runs in real time; no cluster, no global scheduler.

    llm = LLM("path/to/model")
    for output in llm.generate(["Once upon a time", "The capital of France is"], SamplingParams(max_tokens=32)):
        print(output.text)

Prompts are strings, chats (lists of {"role", "content"} messages) or token ids, one or a list of them.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memserve.clock import monotonic_ns
from memserve.cluster.build import build_instance
from memserve.cluster.engine import build_engine
from memserve.cluster.interruption import sigint_held_back
from memserve.compose import load_config, words_of
from memserve.instance import Instance
from memserve.messages import Abort, Dispatch, Finished, Tokens, pack_tokens, unpack_tokens
from memserve.model.detokenizer import Detokenizer, StopChecker
from memserve.model.tokenizer import Tokenizer
from memserve.request import Role, TokenLogprobs, require_priority
from memserve.sampling_params import SamplingParams
from memserve.sched.queue_policy import QueuePolicy

_OF_MODEL = ("dtype", "device", "attention", "compile", "fused_rows", "early_launches", "max_context", "num_threads")
_OF_KVCACHE = ("num_dram_blocks", "hbm_bytes", "dram_bytes", "async_swap", "swap_ahead_blocks")
OPTIONS = {
    **{name: name for name in ("index", "eviction", "queue", "batching", "preemption", "swap", "layout", "seed")},
    **{name: f"model.{name}" for name in _OF_MODEL},
    **{name: f"sched.{name}" for name in ("token_budget", "chunk_size", "max_running", "lookahead")},
    "block_size": "kvcache.block_size",
    "num_blocks": "kvcache.num_hbm_blocks",
    **{name: f"kvcache.{name}" for name in _OF_KVCACHE},
}


@dataclass(frozen=True)
class Output:
    """One answer. num_cached: prompt tokens taken from the cache. finish_reason: stop or length.

    text: continues the prompt's, so it may begin with a space; ends before what stops it.  token_ids: all generated.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    num_cached: int
    finish_reason: str
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class Delta:
    """A piece of the answer to prompt number `index`. `output` is the whole answer, on its last piece only."""

    index: int
    token_ids: list[int]
    text: str
    output: Output | None = None


class LLM:
    """A model, its pool and its scheduler.

    path: a Hugging Face directory, a .gguf file, or package:NAME for one shipped in an installed Python package.
    options: the configuration's words (see OPTIONS and configs/), such as index="none", block_size=32, num_blocks=512,
        dtype="bfloat16", compile=True; a class of one's own is index={"_target_": "my_package.MyIndex", ...} with its
        options, or attention="my_package.MyAttention".

    Raises ValueError for an unknown option or a value out of range, naming what is allowed.
    """

    def __init__(self, path: str, **options: Any) -> None:
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(f"LLM option {unknown[0]!r}: expected one of {', '.join(sorted(OPTIONS))}")
        words = [word for name, value in options.items() for word in words_of(OPTIONS[name], value)]
        cfg = load_config([*words_of("model.path", str(path)), *words])
        engine = build_engine(cfg)
        self.tokenizer: Tokenizer = engine.tokenizer
        self.instance: Instance = build_instance(cfg, engine, "llm", Role.COLOCATED, incarnation=0, in_real_time=True)
        self._num_requests = 0
        self._turn = threading.Lock()  # of who gives the instance something or computes: one at a time
        self._heard: dict[str, deque[Tokens | Finished]] = {}  # for each request what its stream has not read yet
        self._unread: deque[str] = deque()  # requests that no stream reads any more, to be aborted

    def generate(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool = False,
        priority: int | Sequence[int] = 0,
    ) -> Any:
        """Answers to `prompts`, in their order: list[Output], or with stream=True an iterator of Delta as they come.

        params: for all prompts, or one for each; greedy and 128 tokens by default.  priority: for all, or one for each;
        of an LLM with queue="priority", which serves smaller ones first. Several streams may be open at once, in
        threads or in one: what one of them makes the model compute is kept for the others, also where Ctrl-C ends it.
        Raises ValueError naming the first prompt that cannot be served, before any is.
        """
        many, token_ids = _as_list(prompts), list[np.ndarray]()
        each = _one_each(params, len(many))
        priorities = _priorities(priority, len(many), self.instance.scheduler.room.queue)
        for i, (prompt, p) in enumerate(zip(many, each, strict=True)):
            try:
                token_ids.append(self._token_ids(prompt))
                self.instance.check_request(token_ids[i], p)
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}") from error
        deltas = self._stream([ids.astype(np.int32) for ids in token_ids], each, priorities)
        if stream:
            return deltas
        outputs = {delta.index: delta.output for delta in deltas if delta.output is not None}
        return [outputs[i] for i in range(len(token_ids))]

    def _stream(
        self, prompts: list[np.ndarray], params: list[SamplingParams], priorities: list[int]
    ) -> Iterator[Delta]:
        """Serves the prompts; what is unfinished when the caller stops listening is aborted."""
        answers: dict[str, _Answer] = {}
        heard: deque[Tokens | Finished] = deque()
        try:
            with self._turn:
                for i, (ids, p) in enumerate(zip(prompts, params, strict=True)):
                    name = f"llm/{self._num_requests}"
                    self._num_requests += 1
                    answers[name] = _Answer(i, ids, p, self.tokenizer)
                    self._heard[name] = heard
                    dispatch = Dispatch(name, 0, "", pack_tokens(ids), p, monotonic_ns(), priority=priorities[i])
                    self.instance.receive(dispatch)
            while answers:
                with self._turn:
                    if not heard:
                        self._serve()
                        continue
                message = heard.popleft()
                delta = answers[message.request_id].take(message)
                if isinstance(message, Finished):
                    del answers[message.request_id], self._heard[message.request_id]
                self._abort_unread()  # of streams that were closed during the step
                yield delta
        finally:
            for name in answers:
                self._heard.pop(name, None)
                self._unread.append(name)
            self._abort_unread()

    def _abort_unread(self) -> None:
        """Frees what closed streams held. Who computes just now does it, when he has: he may be another thread, or this
        one, whose garbage collector closes a stream whenever it likes.
        """
        while self._unread and self._turn.acquire(blocking=False):
            try:
                self._serve()
            finally:
                self._turn.release()

    def _pass_on(self, messages: Iterable[Tokens | Finished]) -> None:
        """To the streams that are open; nobody asks for what else was aborted."""
        for message in messages:
            heard = self._heard.get(message.request_id)
            if heard is not None:
                heard.append(message)

    def step(self) -> list[Tokens | Finished]:
        """Computes one batch of what `instance` was given, for who drives it alone, with no stream open; what it has to
        say since.
        """
        self._compute()
        return self._said()

    def _serve(self) -> None:
        """Computes one batch for the streams. What it has to say stays with the instance until they have it."""
        self._compute()
        with sigint_held_back():
            self._pass_on(self._said())

    def _said(self) -> list[Tokens | Finished]:
        return [m for m in self.instance.drain_outbox() if isinstance(m, Tokens | Finished)]

    def _compute(self) -> None:
        """One batch. SIGINT may end the forward: what that has written is in no book yet."""
        with sigint_held_back():
            while self._unread:
                self.instance.receive(Abort(self._unread.popleft(), 0))
            batch = self.instance.schedule(monotonic_ns())
            if batch is None:
                self.instance.pool.wait()  # nothing is there to compute meanwhile
                return
        output = self.instance.forward(batch)
        with sigint_held_back():
            self.instance.commit(batch, output, np.array([monotonic_ns()]))

    def _token_ids(self, prompt: Any) -> np.ndarray:
        """Integers [n] from a string, a chat or token ids, which may be out of range."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            return self.tokenizer.chat_prompt(prompt)
        try:
            ids = np.asarray(prompt)
        except ValueError:  # a list of lists of different lengths
            ids = np.empty((0, 0))
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(f"{prompt!r}: expected a string, chat messages or a list of token ids")
        return ids


@dataclass
class _Answer:
    """An answer while it grows."""

    index: int
    prompt: np.ndarray
    params: SamplingParams
    tokenizer: Tokenizer
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        last = self.params.last_tokens(self.tokenizer.eos_token_ids)
        self._detokenizer = Detokenizer(self.tokenizer, self.prompt, last)
        self._stops = StopChecker(self.params.stop)

    def take(self, message: Tokens | Finished) -> Delta:
        """The piece that a message adds."""
        if isinstance(message, Finished):
            return self._end(message)
        new = unpack_tokens(message.token_ids).tolist()
        self.token_ids += new
        self.logprobs += message.logprobs or []
        return Delta(self.index, new, self._add("".join(self._detokenizer.push(t) for t in new)))

    def _add(self, text: str) -> str:
        certain = self._stops.push(text)
        self.text += certain
        return certain

    def _end(self, message: Finished) -> Delta:
        assert message.stats is not None, f"{message.reason}: {message.detail}"
        last, rest = self._add(self._detokenizer.flush()), self._stops.flush()
        self.text += rest
        output = Output(
            prompt_token_ids=self.prompt.tolist(),
            token_ids=self.token_ids,
            text=self.text,
            num_cached=message.stats.num_cached_local,
            finish_reason=str(message.reason),
            logprobs=None if self.params.logprobs is None else self.logprobs,
        )
        return Delta(self.index, [], last + rest, output)


def _as_list(prompts: Any) -> list[Any]:
    """One prompt or many, as many."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping | bytes) or not np.iterable(prompts):
        raise ValueError(
            f"prompts={prompts!r}: expected a string, a chat (a list of messages), token ids, or many of these"
        )
    many = list(prompts)
    if many and isinstance(many[0], Mapping | int | np.integer):
        return [many]
    if getattr(prompts, "ndim", 0) == 1:  # an array, or torch's
        return [prompts]
    return many


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    each = list(params) if isinstance(params, Iterable) else [params]
    if not all(isinstance(p, SamplingParams) for p in each):
        raise ValueError(f"params={params!r}: expected SamplingParams, or a list of them, one for each prompt")
    if len(each) != count:
        raise ValueError(f"{len(each)} sampling params for {count} prompts: expected one, or one for each")
    return each


def _priorities(given: int | Sequence[int], count: int, queue: QueuePolicy) -> list[int]:
    """One for each of `count` prompts. Raises ValueError for what is none, or what the queue does not look at."""
    if not isinstance(given, str) and isinstance(given, Iterable):
        each = [require_priority(f"priority of prompt {i}", priority) for i, priority in enumerate(given)]
    else:
        each = [require_priority("priority", given)] * count
    if len(each) != count:
        raise ValueError(f"{len(each)} priorities for {count} prompts: expected one, or one for each")
    if any(each) and not queue.looks_at_priority:
        raise ValueError(f"priority={given!r} contradicts queue={type(queue).__name__}, which does not look at it: "
                         "expected 0, or queue=\"priority\"")  # fmt: skip
    return each
