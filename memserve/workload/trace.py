"""TraceWorkload: the requests of a production trace, at the trace's own times, a session of one turn each.

A trace has lengths, no text. Where it says which blocks of text requests share (`hash_ids`), equal ids become equal
tokens, so that prefixes are shared as they were:

    # a prompt: [tokens of hash_ids[0] | of hash_ids[1] | .. | of the last one, up to input_length]

Where it does not, no two requests share anything. Where it says which chat a request is of, policies see that chat as
its session; the next request of a chat comes when the trace says, whether or not the one before is answered.

An answer's own tokens are no part of a later prompt: that one has what the trace's next prompt had.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from memserve.clock import to_ns, to_s
from memserve.mixing import GOLDEN64, mix64
from memserve.sampling_params import SamplingParams
from memserve.values import require_bool, require_duration, require_int, require_number
from memserve.workload.classes import request_classes
from memserve.workload.conversations import BadConversation, named_by
from memserve.workload.lengths import MAX_TOKENS
from memserve.workload.records import require_enough
from memserve.workload.session import ChatTokenizer, Session, Turn, Workload
from memserve.workload.trace_files import read_trace
from memserve.workload.trace_formats import TraceFormat, TraceRequest

_PLACE = np.uint64(0xD1342543DE82EF95)  # odd, so that no two places have one word


class TraceWorkload(Workload):
    """Requests of a trace. Every constructor argument is a config option under `workload`.

    path: of a file in one of the formats of `trace_formats.py`, known by its fields or columns.
    start_s, duration_s: the requests from so many seconds of the trace after its first line on, and of so many; None is
        to its end.
    num_sessions: of these the first so many; None is all.
    speedup: the trace's time runs so many times as fast; 2 doubles the rate.
    hash_tokens: of a block of text that a hash id names; None: as many as the format's.
    max_output_tokens: most tokens of an answer; None: as many as the trace's.
    skip_empty: leave out requests without a prompt or without an answer (failures are written so), say how many, and go
        on, instead of raising.
    classes: kinds of requests, with shares, priorities and objectives: see `request_classes`.

    Raises ValueError naming option, value and what is allowed; BadConversation for a line that is no request.
    """

    def __init__(
        self,
        path: str,
        num_sessions: int | None = None,
        speedup: float = 1.0,
        hash_tokens: int | None = None,
        max_output_tokens: int | None = None,
        skip_empty: bool = False,
        start_s: float = 0.0,
        duration_s: float | None = None,
        classes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.classes = request_classes(classes)
        self._path = Path(path)
        self._num_sessions = None if num_sessions is None else require_int("num_sessions", num_sessions, 1)
        self._speedup = require_number("speedup", speedup, "a number in [1e-6, 1e6]", minimum=1e-6, maximum=1e6)
        self._given_tokens = None if hash_tokens is None else require_int("hash_tokens", hash_tokens, 1, MAX_TOKENS)
        self._most = None if max_output_tokens is None else require_int("max_output_tokens", max_output_tokens, 1)
        self._skip_empty = require_bool("skip_empty", skip_empty)
        self._num_skipped = 0
        self._start_ns = to_ns(require_duration("start_s", start_s))
        self._duration_ns = None if duration_s is None else to_ns(require_duration("duration_s", duration_s))

    def sessions(self, tokenizer: ChatTokenizer, seed: int) -> list[Session]:
        """See Workload. Of the tokenizer only its `vocab_size` is asked."""
        require_int("seed", seed, 0)
        found, lines = read_trace(self._path, self._given_tokens)
        requests = list(islice(self._played(found, self._within(lines)), self._num_sessions))
        skipped = f" ({self._num_skipped} skipped)" if self._skip_empty else ""
        require_enough(
            self._num_sessions, len(requests), f"{self._path} holds {len(requests)} requests{self._window()}{skipped}"
        )
        hash_tokens = self._given_tokens or found.hash_tokens
        first_ns, last_ns = (of(request.time_ns for request in requests) for of in (min, max))
        self.figures = {
            "format": found.name,
            "time_unit": found.time_unit,
            "hash_tokens": hash_tokens,
            "span_s": to_s(last_ns - first_ns),
            "skipped_empty": self._num_skipped,
        }
        return [
            Session(
                session_id=f"trace-{number:06d}",
                arrival_ns=round((request.time_ns - first_ns) / self._speedup),
                turns=(self._turn(request, number, hash_tokens, tokenizer.vocab_size, seed),),
                suffix=np.empty(0, dtype=np.int32),
                chat=request.chat,
                **named_by(request.where, request.names, self.classes),
            )
            for number, request in enumerate(requests)
        ]

    def _within(self, requests: Iterator[TraceRequest]) -> Iterator[TraceRequest]:
        """Those of the time that is played."""
        first = next(requests, None)
        if first is None:
            return
        from_ns = first.time_ns + self._start_ns
        for request in chain([first], requests):
            passed_ns = request.time_ns - from_ns
            if (passed_ns >= 0 or not self._start_ns) and (self._duration_ns is None or passed_ns < self._duration_ns):
                yield request

    def _window(self) -> str:
        """Which part of the trace is meant, in words; "" for all of it."""
        end = "" if self._duration_ns is None else f" for {to_s(self._duration_ns):g} s"
        return f" from {to_s(self._start_ns):g} s on{end}" if self._start_ns or end else ""

    def _played(self, found: TraceFormat, requests: Iterator[TraceRequest]) -> Iterator[TraceRequest]:
        """The requests that have a prompt and an answer."""
        self._num_skipped = 0
        for request in requests:
            if request.num_prompt and request.num_output:
                yield request
            elif self._skip_empty:
                self._num_skipped += 1
            else:
                empty = found.fields[2 if request.num_prompt else 1]
                raise BadConversation(f"{request.where}: {empty}=0: expected a number of tokens from 1 to "
                                      f"{MAX_TOKENS}; workload.skip_empty=true leaves such requests out")  # fmt: skip

    def _turn(self, request: TraceRequest, number: int, hash_tokens: int | None, vocab_size: int, seed: int) -> Turn:
        texts = np.array([number]) if request.ids is None else request.ids
        length = request.num_prompt if len(texts) == 1 or hash_tokens is None else hash_tokens
        words = _words(texts, length, seed)[: request.num_prompt]
        tokens = (mix64(words) % np.uint64(vocab_size)).astype(np.int32)
        num_output = request.num_output if self._most is None else min(request.num_output, self._most)
        params = SamplingParams(max_tokens=num_output, ignore_eos=True)
        return Turn(tokens, params)


def _words(texts: np.ndarray, length: int, seed: int) -> np.ndarray:
    """uint64 [n * length]: one for each token of n texts (int64 [n]), of the seed, its text and its place in that."""
    within = np.arange(length, dtype=np.uint64) + np.uint64(seed)
    return (texts.astype(np.uint64)[:, None] * np.uint64(GOLDEN64) + within * _PLACE).ravel()
