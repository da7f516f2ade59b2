"""Detokenizer and StopChecker: an answer as text while it grows. They know tokens and text; no request and no model.

token -> Detokenizer.push -> whole characters -> StopChecker.push -> text that no stop string can take back
"""

from collections.abc import Collection, Sequence
from itertools import islice

import numpy as np

from memserve.model.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"
MIN_CONTEXT, MAX_CONTEXT = 5, 8  # tokens of a prompt's end; a character has at most four, one for each byte
MAX_BEGUN = 3  # tokens of a character that lacks its last byte


class Detokenizer:
    """Text of a growing answer: the pieces that `push` and `flush` return, joined, are what `decode` of prompt and
    answer has beyond `decode` of the prompt, as in vLLM and SGLang: of "▁a ▁time" after "▁upon" it is " a time".

    silent: tokens without text, beside those that the tokenizer leaves out.

    prompt: int32 [num_prompt]. Of a character that it begins and the answer ends, all is the answer's. (Byte tokens
    that form no UTF-8 are the exception: a sentencepiece decoder then also takes back the valid characters among them,
    while a piece that was returned stays.)

    What a token adds depends on the tokens before it (the first of all drops its space, a character has several bytes),
    so it is read off a short window: [window, done) is the prompt's end or was returned already and gives context,
    [done, end) is pending.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, silent: Collection[int] = ()) -> None:
        self._tokenizer, self._silent = tokenizer, silent
        self._ids, self._done = _end_of(tokenizer, prompt)
        self._window = 0
        self._told = ""  # what the prompt's last bytes are as long as they are no character
        self._told = self._pending()

    def push(self, token_id: int) -> str:
        """Adds one token; returns the text that is now certain, "" while a character is incomplete."""
        if token_id in self._silent or self._tokenizer.is_silent(token_id):
            return ""
        self._ids.append(token_id)
        text = self._pending()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._window, self._done, self._told = self._done, len(self._ids), ""
        return text

    def flush(self) -> str:
        """The rest, an incomplete last character as U+FFFD."""
        text = self._pending()
        self._window = self._done = len(self._ids)
        return text

    def _pending(self) -> str:
        context = self._tokenizer.decode(self._ids[self._window : self._done])
        return self._tokenizer.decode(self._ids[self._window :])[len(context) :].removeprefix(self._told)


def _end_of(tokenizer: Tokenizer, prompt: np.ndarray) -> tuple[list[int], int]:
    """The last tokens that have text, and how many of them are whole characters; what follows begins one.

    They begin with a character, too: bytes that continue one can make a decoder give up all bytes after them.
    """
    with_text = (token_id for token_id in map(int, reversed(prompt)) if not tokenizer.is_silent(token_id))
    ids = [*islice(with_text, MAX_CONTEXT + MAX_BEGUN)][::-1]
    for end in range(len(ids), max(len(ids) - MAX_BEGUN, 0) - 1, -1):
        for start in range(max(end - MIN_CONTEXT, 0), max(end - MAX_CONTEXT, 0) - 1, -1):
            text = tokenizer.decode(ids[start:end])
            if not text.startswith(INCOMPLETE) and not text.endswith(INCOMPLETE):
                return ids[start:], end - start
    return ids, len(ids)


class StopChecker:
    """Ends a text before the stop string that is complete first (of two that end together, the longer one).

    The result does not depend on how tokens cut the text: what may be the beginning of a stop string is held back until
    that is decided.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Adds text; returns what is certain. Once `stopped`, everything after the stop string is dropped."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found)[1])
        return self._release(len(self._held) - self._num_undecided())

    def flush(self) -> str:
        """What was held back, at the end of an answer that met no stop string."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, num_chars: int) -> str:
        text, self._held = self._held[:num_chars], self._held[num_chars:]
        return text

    def _num_undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stop):
                return length
        return 0
