"""AgentWorkload: agents that think, act and observe (ReAct). Each step is a request behind everything before it.

    # first prompt: [few-shot prompt, shared by all | Question: ... | Thought 1:]
    # a later step: [Observation k: from the file | Thought k+1:], after the model's own thought and action

What the file has for thought and action is not sent; it sets how long each answer is, as in ChatWorkload.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memserve.clock import to_ns
from memserve.sampling_params import SamplingParams
from memserve.values import require_duration, require_int, require_part
from memserve.workload.arrivals import Arrivals, Poisson, arrival_times_ns
from memserve.workload.classes import request_classes
from memserve.workload.conversations import named_by, read_file
from memserve.workload.records import iter_records, require_enough, require_fields
from memserve.workload.session import CLIENT_S, ChatTokenizer, Session, Turn, Workload, figures_of_text

PACKAGED_TRAJECTORIES = Path(__file__).parent / "data" / "trajectories.jsonl"
PACKAGED_FEW_SHOT = Path(__file__).parent / "data" / "few_shot.txt"
_DEFAULT_ARRIVALS = Poisson()


class AgentWorkload(Workload):
    """Agents' trajectories, a session each. Every constructor argument is a config option under `workload`.

    path: JSON lines with `id`, `question` and `steps` of `thought`, `action`, `observation`; None is a packaged set.
    prompt_path: the few-shot prompt's text; None is the packaged one.
    num_sessions: the first so many trajectories; None is all.  rate: sessions a second over the whole cluster.
    think_time_s: that a tool takes.  max_turns: the first so many steps of each; None is all.
    max_output_tokens: most tokens of an answer; else it has as many as the file's thought and action.
    classes: kinds of requests, with shares, priorities and objectives: see `request_classes`.

    Raises ValueError naming option, value and what is allowed.
    """

    def __init__(
        self,
        path: str | None = None,
        prompt_path: str | None = None,
        num_sessions: int | None = None,
        rate: float | None = 1.0,
        arrivals: Arrivals = _DEFAULT_ARRIVALS,
        think_time_s: float = CLIENT_S,
        max_turns: int | None = None,
        max_output_tokens: int = 128,
        classes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.classes = request_classes(classes)
        self._path = PACKAGED_TRAJECTORIES if path is None else Path(path)
        self._prompt_path = PACKAGED_FEW_SHOT if prompt_path is None else Path(prompt_path)
        self._num_sessions = None if num_sessions is None else require_int("num_sessions", num_sessions, 1)
        require_part("workload", "arrivals", arrivals, Arrivals)
        arrivals.check_rate(rate)
        self._arrivals, self._rate, self.concurrency = arrivals, rate, arrivals.concurrency
        self._think_time_ns = to_ns(require_duration("think_time_s", think_time_s))
        self._max_turns = None if max_turns is None else require_int("max_turns", max_turns, 1)
        self._max_output_tokens = require_int("max_output_tokens", max_output_tokens, 1)

    def sessions(self, tokenizer: ChatTokenizer, seed: int) -> list[Session]:
        """See Workload. Raises BadConversation with file and line, ValueError without a file or with too few."""
        self.figures = figures_of_text(tokenizer)
        few_shot = self._few_shot()
        records = list(iter_records(self._path, {"question": str, "steps": list}))[: self._num_sessions]
        require_enough(self._num_sessions, len(records), f"{self._path} holds {len(records)} trajectories")
        rng = np.random.default_rng(require_int("seed", seed, 0))
        arrivals_ns = arrival_times_ns(self._arrivals, len(records), self._rate, rng)
        return [
            self._session(where, record, int(arrival_ns), few_shot, tokenizer)
            for (where, record), arrival_ns in zip(records, arrivals_ns, strict=True)
        ]

    def _session(
        self, where: str, record: dict[str, Any], arrival_ns: int, few_shot: str, tokenizer: ChatTokenizer
    ) -> Session:
        turns = tuple(self._turns(where, record, few_shot, tokenizer))
        return Session(record["id"], arrival_ns, turns, _NOTHING, **named_by(where, record, self.classes))

    def _few_shot(self) -> str:
        try:
            text = read_file("workload.prompt_path", self._prompt_path).decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"workload.prompt_path={str(self._prompt_path)!r}"
            raise ValueError(f"{where}: invalid UTF-8 at byte {error.start} of the file") from None
        return text.replace("\r\n", "\n")

    def _turns(self, where: str, record: dict[str, Any], few_shot: str, tokenizer: ChatTokenizer) -> Iterator[Turn]:
        """A request for each step; what is observed after the last one is asked about by nobody."""
        num_special = len(tokenizer.encode(""))  # a begin-of-sequence token belongs to the first prompt alone
        text = f"{few_shot}Question: {record['question']}\nThought 1:"
        for number, step in enumerate(record["steps"][: self._max_turns], start=1):
            require_fields(f"{where}, step {number}", step, {"thought": str, "action": str, "observation": str})
            tokens = tokenizer.encode(text)[num_special if number > 1 else 0 :]
            answer = tokenizer.encode(f" {step['thought']}\nAction {number}: {step['action']}")
            length = min(max(len(answer) - num_special, 1), self._max_output_tokens)
            params = SamplingParams(max_tokens=length, ignore_eos=True)
            yield Turn(tokens, params, self._think_time_ns if number > 1 else 0)
            text = f"\nObservation {number}: {step['observation']}\nThought {number + 1}:"


_NOTHING = np.empty(0, dtype=np.int32)  # closes an answer: the text simply goes on
