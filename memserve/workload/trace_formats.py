"""Formats of production traces: how a line's is known, and what it says. One class a format. Knows no file.

A line's life: a record of JSON or of a CSV's row -> checked, its numbers too -> a TraceRequest.

Fields and columns are found by name, in any order, with others beside them that nobody asks. A unit of time belongs to
a format, and no line has the fields of two of them, so that no second is taken for a millisecond.

Read off the published files and their descriptions: kvcache-ai/Mooncake (FAST25-release),
alibaba-edu/qwen-bailian-usagetraces-anon, Azure/AzurePublicDataset (2023, 2024), HPMLL/BurstGPT (releases 1 and 2) and
microsoft/vidur (data/processed_traces).
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from memserve.clock import MAX_S, date_ns, to_ns
from memserve.workload.conversations import BadConversation
from memserve.workload.lengths import MAX_TOKENS

_NO_NAMES: Mapping[str, Any] = {}
_DATE_AND_TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d", re.ASCII)


@dataclass(frozen=True)
class TraceRequest:
    """A line of a trace. where: "file:line".

    time_ns: of its arrival, from whenever the format counts.  num_prompt, num_output: tokens, from 0 on.
    ids: int64 [n] of the blocks of text that its prompt is made of, or None.
    chat: of which it is one request, where the format has chats and the line is of one.
    names: its class and priority, where a line of JSON has such fields.
    """

    where: str
    time_ns: int
    num_prompt: int
    num_output: int
    ids: np.ndarray | None
    chat: str | None
    names: Mapping[str, Any] = field(default_factory=lambda: _NO_NAMES)


class TraceFormat(ABC):
    """One format, for the reading of one file.

    fields: that a line must have; the first three are its time, its prompt's tokens and its answer's.
    lacks: those that make it a line of another format.  optional: those that are looked at where they are.
    time_unit: what a time is in.  hash_tokens: of the text that one of its `hash_ids` names; None: it has none.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    lacks: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    time_unit: ClassVar[str] = "s"
    hash_tokens: ClassVar[int | None] = None

    @classmethod
    def fits(cls, names: Collection[str]) -> bool:
        """Whether a record or a header with these names is of this format."""
        return all(name in names for name in cls.fields) and not any(name in names for name in cls.lacks)

    @classmethod
    def described(cls) -> str:
        """Its fields, for messages."""
        return ", ".join(cls.fields) + (f" and no {' or '.join(cls.lacks)}" if cls.lacks else "") + f" ({cls.name})"

    def request(self, where: str, record: dict[str, Any], hash_tokens: int | None) -> TraceRequest:
        """What a line says. record: its numbers as numbers.  hash_tokens: of a hash id's text; None: it has none."""
        num_prompt, num_output = (_count(where, name, record[name]) for name in self.fields[1:3])
        ids = None if hash_tokens is None else _ids(where, record["hash_ids"], num_prompt, hash_tokens)
        time_ns = self.time_ns(where, record[self.fields[0]])
        return TraceRequest(where, time_ns, num_prompt, num_output, ids, self.chat(where, record))

    @abstractmethod
    def time_ns(self, where: str, value: Any) -> int:
        """Its time in nanoseconds. Raises BadConversation for what is none in the format's unit."""

    def chat(self, where: str, record: dict[str, Any]) -> str | None:
        """The chat that a request is of."""
        return None

    def _seconds_ns(self, where: str, value: Any, longest_s: float = MAX_S) -> int:
        if type(value) not in (int, float) or not 0 <= value <= longest_s:
            raise BadConversation(f"{where}: {self.fields[0]}={value!r}: expected seconds from 0 to {longest_s:g}")
        return to_ns(value)


class Mooncake(TraceFormat):
    """JSON lines; milliseconds from the trace's start; an id for each 512 tokens begun, of all the text up to there."""

    name = "Mooncake"
    fields = ("timestamp", "input_length", "output_length", "hash_ids")
    lacks = ("chat_id", "parent_chat_id")
    time_unit = "ms"
    hash_tokens = 512

    def time_ns(self, where: str, value: Any) -> int:
        longest_ms = 1e3 * MAX_S
        if type(value) not in (int, float) or not 0 <= value <= longest_ms:
            raise BadConversation(f"{where}: timestamp={value!r}: expected milliseconds from 0 to {longest_ms:g}")
        return to_ns(value / 1e3)


class Bailian(TraceFormat):
    """JSON lines; seconds from the trace's start; an id for each 16 tokens begun, of that text alone or of all before.

    Every request has a chat_id of its own, and that of the request before it in its chat as parent_chat_id, or -1. The
    first one's names the chat here; a parent that has not come names it where there is one: a published trace begins
    within chats. Two lines with one chat_id, and chats that are their own parents, are no requests of chats.
    """

    name = "Qwen-Bailian"
    fields = (*Mooncake.fields, "chat_id", "parent_chat_id")
    hash_tokens = 16
    longest_s = 31 * 86_400.0  # the published ones last two hours, which in milliseconds would be 83 days

    def __init__(self) -> None:
        self._firsts: dict[int, int] = {}  # chat_id -> that of the first request of its chat
        self._parents: dict[int, int] = {}  # chat_id -> parent_chat_id
        self._awaited = set[int]()  # parents that have not come

    def time_ns(self, where: str, value: Any) -> int:
        return self._seconds_ns(where, value, self.longest_s)

    def chat(self, where: str, record: dict[str, Any]) -> str:
        chat_id, parent = (_chat_id(where, name, record[name]) for name in self.fields[4:])
        if chat_id < 0:
            raise BadConversation(f"{where}: chat_id={chat_id}: expected an integer from 0 on")
        if chat_id in self._parents:
            raise BadConversation(f"{where}: chat_id={chat_id}, as on an earlier line: expected one of its own")
        if self._leads_to(chat_id, parent):
            raise BadConversation(f"{where}: parent_chat_id={parent} leads back to chat_id={chat_id}: expected that of "
                                  "the request before it in its chat, or -1")  # fmt: skip
        self._parents[chat_id] = parent
        self._awaited.discard(chat_id)
        if parent not in self._parents:
            self._awaited.add(parent)
        first = chat_id if parent == -1 else self._firsts.get(parent, parent)
        self._firsts[chat_id] = first
        return f"chat-{first}"

    def _leads_to(self, chat_id: int, parent: int) -> bool:
        """Whether a request that comes with this parent is, by way of others, its own. Who names it has come before."""
        if chat_id not in self._awaited:
            return parent == chat_id
        while parent != chat_id and parent in self._parents:
            parent = self._parents[parent]
        return parent == chat_id


class Azure(TraceFormat):
    """CSV; dates, with an offset (2024) or without (2023); lengths alone. 2025's has images: they count for nothing."""

    name = "Azure"
    fields = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    time_unit = "dates"

    def time_ns(self, where: str, value: Any) -> int:
        try:
            if not isinstance(value, str) or not _DATE_AND_TIME.match(value):
                raise ValueError("a number, or a date alone")
            return date_ns(value)
        except ValueError as error:
            raise BadConversation(f"{where}: TIMESTAMP={value!r}: expected a date and a time") from error


class BurstGpt(TraceFormat):
    """CSV; seconds, not from 0 on; lengths alone. A failure has an answer of 0 tokens, and some have no prompt either.

    Release 2 has a Session ID, which is empty for the requests of its API.
    """

    name = "BurstGPT"
    fields = ("Timestamp", "Request tokens", "Response tokens")
    optional = ("Session ID",)

    def time_ns(self, where: str, value: Any) -> int:
        return self._seconds_ns(where, value)

    def chat(self, where: str, record: dict[str, Any]) -> str | None:
        name = record.get("Session ID")
        return f"chat-{name}" if name else None


class Vidur(TraceFormat):
    """CSV; seconds; lengths alone. Its files that have lengths and no times are no traces."""

    name = "Vidur"
    fields = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")

    def time_ns(self, where: str, value: Any) -> int:
        return self._seconds_ns(where, value)


JSON_FORMATS: tuple[type[TraceFormat], ...] = (Mooncake, Bailian)
CSV_FORMATS: tuple[type[TraceFormat], ...] = (Azure, BurstGpt, Vidur)


def expected() -> str:
    """What a file may be, for messages."""
    objects, headers = (" or ".join(f.described() for f in formats) for formats in (JSON_FORMATS, CSV_FORMATS))
    return f"expected an object with {objects}, one a line, or a header with {headers}, joined by commas"


def _count(where: str, name: str, value: Any) -> int:
    """A number of tokens from 0 on; 374.0 and 3.74e2 are 374, as programs write them."""
    number = int(value) if type(value) is float and value.is_integer() else value
    if type(number) is not int or not 0 <= number <= MAX_TOKENS:
        raise BadConversation(f"{where}: {name}={value!r}: expected a number of tokens from 1 to {MAX_TOKENS}")
    return number


def _ids(where: str, ids: Any, num_prompt: int, hash_tokens: int) -> np.ndarray:
    """int64 [n]: an id for each `hash_tokens` begun. What a request without a prompt has there is not looked at."""
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**40 for i in ids):
        raise BadConversation(f"{where}: 'hash_ids': expected a list of integers from 0")
    if num_prompt and -(-num_prompt // hash_tokens) != len(ids):
        raise BadConversation(f"{where}: input_length={num_prompt} with {len(ids)} hash_ids: expected one for each "
                              f"{hash_tokens} tokens begun; workload.hash_tokens says how many")  # fmt: skip
    return np.asarray(ids, dtype=np.int64)


def _chat_id(where: str, name: str, value: Any) -> int:
    if type(value) is not int or value < -1:
        raise BadConversation(f"{where}: {name}={value!r}: expected an integer from {'-1' if 'parent' in name else 0}")
    return value
