"""DocumentQA: questions about long documents, each from a session of its own, so that sessions share the documents.

    # a prompt: [the document's first document_tokens, shared by all its questions | Question: ... Answer:]

The paper's LooGLE set-up: the first 1k tokens of a document and its first 5 questions (section 8.1).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memserve.sampling_params import SamplingParams
from memserve.values import require_int, require_part
from memserve.workload.arrivals import Arrivals, Poisson, arrival_times_ns
from memserve.workload.classes import request_classes
from memserve.workload.conversations import NamedBy, named_by
from memserve.workload.records import iter_records, require_enough, require_fields
from memserve.workload.session import ChatTokenizer, Session, Turn, Workload, figures_of_text

PACKAGED_DOCUMENTS = Path(__file__).parent / "data" / "documents.jsonl"
_DEFAULT_ARRIVALS = Poisson()


class DocumentQA(Workload):
    """Questions in random order, a session each. Every constructor argument is a config option under `workload`.

    path: JSON lines with `id`, `document` and `questions` of `q` and `a`; None is a packaged set.
    document_tokens: of a document's beginning that a prompt has.  questions: most of a document.
    num_sessions: so many of the questions, drawn at random; None is all.  rate: sessions a second over the cluster.
    max_output_tokens: most tokens of an answer; else it has as many as the file's own.
    classes: kinds of requests, with shares, priorities and objectives: see `request_classes`.

    Raises ValueError naming option, value and what is allowed.
    """

    def __init__(
        self,
        path: str | None = None,
        document_tokens: int = 1000,
        questions: int = 5,
        num_sessions: int | None = None,
        rate: float | None = 1.0,
        arrivals: Arrivals = _DEFAULT_ARRIVALS,
        max_output_tokens: int = 128,
        classes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.classes = request_classes(classes)
        self._path = PACKAGED_DOCUMENTS if path is None else Path(path)
        self._document_tokens = require_int("document_tokens", document_tokens, 1)
        self._questions = require_int("questions", questions, 1)
        self._num_sessions = None if num_sessions is None else require_int("num_sessions", num_sessions, 1)
        require_part("workload", "arrivals", arrivals, Arrivals)
        arrivals.check_rate(rate)
        self._arrivals, self._rate, self.concurrency = arrivals, rate, arrivals.concurrency
        self._max_output_tokens = require_int("max_output_tokens", max_output_tokens, 1)

    def sessions(self, tokenizer: ChatTokenizer, seed: int) -> list[Session]:
        """See Workload. Raises BadConversation with file and line, ValueError when there is no file or too few."""
        self.figures = figures_of_text(tokenizer)
        rng = np.random.default_rng(require_int("seed", seed, 0))
        asked = [
            (f"{record['id']}/{number}", turn, named_by(where, record, self.classes))
            for where, record in iter_records(self._path, {"document": str, "questions": list})
            for number, turn in enumerate(self._turns(where, record, tokenizer))
        ]
        require_enough(self._num_sessions, len(asked), f"{self._path} holds {len(asked)} questions")
        order = rng.permutation(len(asked))[: self._num_sessions]
        arrivals_ns = arrival_times_ns(self._arrivals, len(order), self._rate, rng)
        return [_session(asked[i], int(arrival_ns)) for i, arrival_ns in zip(order, arrivals_ns, strict=True)]

    def _turns(self, where: str, record: dict[str, Any], tokenizer: ChatTokenizer) -> list[Turn]:
        """A document's questions, a request each."""
        num_special = len(tokenizer.encode(""))
        document = tokenizer.encode(record["document"])[: self._document_tokens]
        turns = []
        for number, question in enumerate(record["questions"][: self._questions], start=1):
            require_fields(f"{where}, question {number}", question, {"q": str, "a": str})
            asked = tokenizer.encode(f"\nQuestion: {question['q']}\nAnswer:")[num_special:]
            length = len(tokenizer.encode(f" {question['a']}")) - num_special
            params = SamplingParams(max_tokens=min(max(length, 1), self._max_output_tokens), ignore_eos=True)
            turns.append(Turn(np.concatenate([document, asked]), params))
        return turns


def _session(asked: tuple[str, Turn, NamedBy], arrival_ns: int) -> Session:
    """Of one question."""
    session_id, turn, named = asked
    nothing = np.empty(0, dtype=np.int32)
    return Session(session_id, arrival_ns, (turn,), nothing, **named)
