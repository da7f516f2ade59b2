"""SyntheticWorkload: sessions of random tokens whose lengths and shared prefixes are set by parameter. No text at all.

    # first prompt of a session: [prefix_tokens, the same in its group | prompt_tokens of its own]
    # a later turn adds:         [turn_tokens of its own]

`share_ratio` sessions share each prefix (the paper's share ratio, Fig. 15). A session's own tokens depend on the seed
and its number alone, so adding sessions leaves the others as they were.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from memserve.clock import to_ns
from memserve.sampling_params import SamplingParams
from memserve.values import require_duration, require_int, require_number, require_part
from memserve.workload.arrivals import Arrivals, Poisson, arrival_times_ns
from memserve.workload.classes import request_classes
from memserve.workload.lengths import MAX_TOKENS, Fixed, Lengths
from memserve.workload.session import CLIENT_S, ChatTokenizer, Session, Turn, Workload

MAX_SESSIONS = 10**7  # and turns of each: all are made before the run begins
_DEFAULT_ARRIVALS = Poisson()
_DEFAULT_LENGTHS = Fixed()
_ARRIVALS, _GROUPS, _PREFIX, _SESSION = range(4)  # independent streams of random numbers


class SyntheticWorkload(Workload):
    """Random sessions. Every constructor argument is a config option under `workload`.

    num_sessions, num_turns: how many sessions, and how many turns in each.
    rate: sessions a second over the whole cluster; None in closed loop.
    prompt_tokens, turn_tokens: mean length of a session's own first prompt and of what each later turn adds.
    prefix_tokens: length of the prefix that `share_ratio` sessions share; 0 is none.
    output_tokens: mean length of the answers; None makes each max_output_tokens long.
    max_output_tokens: most tokens of an answer. Answers ignore the end-of-sequence token: lengths are exact.
    lengths: how prompts, turns and answers spread around their means (prefixes are exact).  output_lengths: how answers
    do, where that is another way.
    think_time_s: from the end of an answer to the next turn, what a client takes.  temperature: see SamplingParams.
    classes: kinds of requests, with shares, priorities and objectives: see `request_classes`.

    Raises ValueError naming option, value and what is allowed.
    """

    def __init__(
        self,
        num_sessions: int = 32,
        rate: float | None = 1.0,
        arrivals: Arrivals = _DEFAULT_ARRIVALS,
        num_turns: int = 1,
        prompt_tokens: float = 256,
        turn_tokens: float = 64,
        prefix_tokens: int = 0,
        share_ratio: int = 1,
        output_tokens: float | None = None,
        max_output_tokens: int = 32,
        lengths: Lengths = _DEFAULT_LENGTHS,
        output_lengths: Lengths | None = None,
        think_time_s: float = CLIENT_S,
        temperature: float = 0.0,
        classes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.classes = request_classes(classes)
        self._num_sessions = require_int("num_sessions", num_sessions, 1, MAX_SESSIONS)
        self._num_turns = require_int("num_turns", num_turns, 1, MAX_SESSIONS)
        require_part("workload", "arrivals", arrivals, Arrivals)
        arrivals.check_rate(rate)
        self._arrivals, self._rate, self.concurrency = arrivals, rate, arrivals.concurrency
        self._prompt_tokens = _require_mean("prompt_tokens", prompt_tokens)
        self._turn_tokens = _require_mean("turn_tokens", turn_tokens)
        self._output_tokens = None if output_tokens is None else _require_mean("output_tokens", output_tokens)
        self._prefix_tokens = require_int("prefix_tokens", prefix_tokens, 0, MAX_TOKENS)
        self._share_ratio = require_int("share_ratio", share_ratio, 1, MAX_SESSIONS)
        if self._share_ratio > 1 and self._prefix_tokens == 0:
            raise ValueError(f"share_ratio={share_ratio} with prefix_tokens=0: nothing to share; expected both or none")
        self._max_output_tokens = require_int("max_output_tokens", max_output_tokens, 1)
        require_part("workload", "lengths", lengths, Lengths)
        if not isinstance(output_lengths, Lengths | None):
            raise ValueError(f"output_lengths={output_lengths!r}: expected null, or an object of Lengths "
                             "(config: +workload/lengths@workload.output_lengths=NAME)")  # fmt: skip
        self._lengths, self._output_lengths = lengths, lengths if output_lengths is None else output_lengths
        self._think_time_ns = to_ns(require_duration("think_time_s", think_time_s))
        self._temperature = SamplingParams(temperature=temperature).temperature

    def sessions(self, tokenizer: ChatTokenizer, seed: int) -> list[Session]:
        """See Workload. Asks the tokenizer for its `vocab_size` only."""
        require_int("seed", seed, 0)
        arrivals_ns = arrival_times_ns(self._arrivals, self._num_sessions, self._rate, _rng(seed, _ARRIVALS))
        groups = self._groups(_rng(seed, _GROUPS))
        prefixes = [
            _tokens(self._prefix_tokens, tokenizer.vocab_size, _rng(seed, _PREFIX, group))
            for group in range(max(groups) + 1)
        ]
        return [
            Session(
                session_id=f"synthetic-{number:05d}",
                arrival_ns=int(arrivals_ns[number]),
                turns=tuple(self._turns(prefixes[group], tokenizer.vocab_size, _rng(seed, _SESSION, number))),
                suffix=np.empty(0, dtype=np.int32),
            )
            for number, group in enumerate(groups)
        ]

    def _groups(self, rng: np.random.Generator) -> list[int]:
        """Which prefix each session has: `share_ratio` sessions each (the last perhaps fewer), in random order."""
        groups = np.arange(self._num_sessions) // self._share_ratio
        return [int(group) for group in rng.permutation(groups)]

    def _turns(self, prefix: np.ndarray, vocab_size: int, rng: np.random.Generator) -> Iterator[Turn]:
        for number in range(self._num_turns):
            mean = self._turn_tokens if number else self._prompt_tokens
            tokens = _tokens(int(self._lengths.draw(mean, 1, rng)[0]), vocab_size, rng)
            params = SamplingParams(
                temperature=self._temperature, max_tokens=self._draw_output_tokens(rng), ignore_eos=True
            )
            if number == 0:
                tokens = np.concatenate([prefix, tokens])
            yield Turn(tokens, params, self._think_time_ns if number else 0)

    def _draw_output_tokens(self, rng: np.random.Generator) -> int:
        if self._output_tokens is None:
            return self._max_output_tokens
        return min(int(self._output_lengths.draw(self._output_tokens, 1, rng)[0]), self._max_output_tokens)


def _require_mean(name: str, value: float) -> float:
    allowed = f"a mean number of tokens in [1, {MAX_TOKENS}]"
    return require_number(name, value, allowed, minimum=1.0, maximum=MAX_TOKENS)


def _rng(*stream: int) -> np.random.Generator:
    return np.random.default_rng(stream)


def _tokens(size: int, vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    """int32 [size] token ids, uniform over the vocabulary."""
    return rng.integers(0, vocab_size, size, dtype=np.int32)
