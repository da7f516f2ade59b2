"""Detokenizer and StopChecker: an answer as text while it grows. They know tokens and text; no request and no model.

token -> Detokenizer.push -> whole characters -> StopChecker.push -> text that no stop string can take back
"""

from collections.abc import Sequence

from memserve.model.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"


class Detokenizer:
    """Text of a growing answer: the pieces that `push` and `flush` return, joined, are `decode` of all ids.

    (Byte tokens that form no UTF-8 are the exception: a sentencepiece decoder then also takes back the valid characters
    among them, while a piece that was returned stays.)

    What a token adds depends on the tokens before it (a space that a first token drops, bytes of one character), so it
    is read off a short window: [window, done) was returned already and gives context, [done, end) is pending.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._window = 0
        self._done = 0

    def push(self, token_id: int) -> str:
        """Adds one token; returns the text that is now certain, "" while a character is incomplete."""
        if self._tokenizer.is_silent(token_id):
            return ""
        self._ids.append(token_id)
        text = self._pending()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._window, self._done = self._done, len(self._ids)
        return text

    def flush(self) -> str:
        """The rest, an incomplete last character as U+FFFD."""
        text = self._pending()
        self._window = self._done = len(self._ids)
        return text

    def _pending(self) -> str:
        context = self._tokenizer.decode(self._ids[self._window : self._done])
        return self._tokenizer.decode(self._ids[self._window :])[len(context) :]


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
