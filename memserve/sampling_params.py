"""SamplingParams: how the tokens of one answer are chosen, checked. Knows no request and no tensor."""

from collections.abc import Collection

import msgspec

from memserve.values import as_tuple, require_bool, require_int, require_number

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_WORD = 2**64 - 1  # of what goes from one instance to another


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one answer are chosen. The defaults are greedy.

    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of tokens whose probability reaches it, in (0, 1].
    min_p: keep tokens at least this times as probable as the most likely one, in [0, 1]; 0 keeps all. What top_k, top_p
        and min_p all keep is kept, as in transformers.
    repetition_penalty: logits of tokens that are in the prompt or the answer so far are divided by it where they are
        positive, else multiplied; 1 changes nothing (CTRL, arXiv 1909.05858).
    presence_penalty, frequency_penalty: taken off the logits of tokens that are in the answer so far, once, and for
        each time that they are; in [-2, 2], as OpenAI's. All penalties hold for greedy answers too.
    seed: the random number of a token is a function of (seed, position) alone; None takes the engine's seed and the
        request's id.
    max_tokens: most tokens to generate, at least 1.
    stop: strings that end the answer; the text ends before the first of them. One that is a special token of the
        tokenizer (`<|im_end|>`), which text leaves out, ends the answer at that token.
    stop_token_ids: tokens that end the answer, beside the model's end-of-sequence tokens.
    ignore_eos: do not end at the model's end-of-sequence tokens.
    logprobs: return the log-probability of each token and of this many most likely ones, as the model has them, before
        any of the above; None returns none.

    Raises ValueError naming the value and what is allowed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
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
        self._set("min_p", require_number("min_p", self.min_p, "a number in [0, 1]", minimum=0.0, maximum=1.0))
        self._check_penalties()
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

    def _check_penalties(self) -> None:
        factor = require_number(
            "repetition_penalty", self.repetition_penalty, "a number in [0.01, 100]", minimum=0.01, maximum=100.0
        )
        self._set("repetition_penalty", factor)
        for name in ("presence_penalty", "frequency_penalty"):
            penalty = require_number(name, getattr(self, name), "a number in [-2, 2]", minimum=-2.0, maximum=2.0)
            self._set(name, penalty)

    def _set(self, name: str, value: object) -> None:
        msgspec.structs.force_setattr(self, name, value)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalises(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def last_tokens(self, eos_token_ids: Collection[int]) -> frozenset[int]:
        """The tokens that end an answer wherever they stand; like stop strings they have no part in its text.

        eos_token_ids: the model's.
        """
        return frozenset((*self.stop_token_ids, *(() if self.ignore_eos else eos_token_ids)))

    @property
    def can_stop_early(self) -> bool:
        """Whether the answer may end before max_tokens, so that its length is not known in advance."""
        return bool(self.stop or self.stop_token_ids or not self.ignore_eos)
