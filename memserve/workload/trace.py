"""TraceWorkload: the requests of a production trace, at the trace's own times, a session of one turn each.

A trace has lengths, no text. Where it says which blocks of text requests share (Mooncake's `hash_ids`), equal ids
become equal tokens, so that prefixes are shared as they were:

    # a prompt: [tokens of hash_ids[0] | of hash_ids[1] | .. | of the last one, up to input_length]

Where it does not (Azure's), no two requests share anything.

An answer's own tokens are no part of a later prompt: that one has what the trace's next prompt had.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from memserve.clock import MAX_S, date_ns, to_ns
from memserve.mixing import GOLDEN64, mix64
from memserve.request import SamplingParams
from memserve.values import require_int, require_number
from memserve.workload.conversations import BadConversation, iter_lines, parse_line, read_file
from memserve.workload.lengths import MAX_TOKENS
from memserve.workload.records import require_enough
from memserve.workload.session import ChatTokenizer, Session, Turn, Workload

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
LONGEST_MS = 1e3 * MAX_S
_PLACE = np.uint64(0xD1342543DE82EF95)  # odd, so that no two places have one word
_BEYOND = "\0"  # no column's name: under it csv puts the cells that are beyond the last column
_MOST_DIGITS = 20
MOONCAKE = ("timestamp", "input_length", "output_length", "hash_ids")


@dataclass(frozen=True)
class _Request:
    """A line of a trace. ids: int64 [n] of the blocks of text that its prompt is made of, or None."""

    time_ns: int
    num_prompt: int
    num_output: int
    ids: np.ndarray | None


class TraceWorkload(Workload):
    """Requests of a trace. Every constructor argument is a config option under `workload`.

    path: JSON lines with `timestamp` (ms), `input_length`, `output_length` and `hash_ids` (Mooncake's format), or CSV
        with TIMESTAMP, ContextTokens and GeneratedTokens (Azure's).
    num_sessions: the first so many requests; None is all.
    speedup: the trace's time runs so many times as fast; 2 doubles the rate.
    hash_tokens: of a block of text that a hash id names (Mooncake's have 512).
    max_output_tokens: most tokens of an answer; None: as many as the trace's.

    Raises ValueError naming option, value and what is allowed; BadConversation for a line that is no request.
    """

    def __init__(
        self,
        path: str,
        num_sessions: int | None = None,
        speedup: float = 1.0,
        hash_tokens: int = 512,
        max_output_tokens: int | None = None,
    ) -> None:
        self._path = Path(path)
        self._num_sessions = None if num_sessions is None else require_int("num_sessions", num_sessions, 1)
        self._speedup = require_number("speedup", speedup, "a number in [1e-6, 1e6]", minimum=1e-6, maximum=1e6)
        self._hash_tokens = require_int("hash_tokens", hash_tokens, 1, MAX_TOKENS)
        self._most = None if max_output_tokens is None else require_int("max_output_tokens", max_output_tokens, 1)

    def sessions(self, tokenizer: ChatTokenizer, seed: int) -> list[Session]:
        """See Workload. Of the tokenizer only its `vocab_size` is asked."""
        require_int("seed", seed, 0)
        requests = list(islice(self._requests(), self._num_sessions))
        require_enough(self._num_sessions, len(requests), f"{self._path} holds {len(requests)} requests")
        first_ns = min(request.time_ns for request in requests)
        return [
            Session(
                session_id=f"trace-{number:06d}",
                arrival_ns=round((request.time_ns - first_ns) / self._speedup),
                turns=(self._turn(request, number, tokenizer.vocab_size, seed),),
                suffix=np.empty(0, dtype=np.int32),
            )
            for number, request in enumerate(requests)
        ]

    def _requests(self) -> Iterator[_Request]:
        text = read_file("workload.path", self._path)
        if _begins_as_csv(text):
            return self._of_csv(text)
        if text.strip() and not text.lstrip().startswith(b"{"):
            raise BadConversation(f"{self._path}:1: expected an object with {', '.join(MOONCAKE)}, one a line, or a "
                                  f"header with {', '.join(AZURE)}, joined by commas")  # fmt: skip
        return (self._from_mooncake(where, parse_line(line, where)) for where, line in iter_lines(text, self._path))

    def _from_mooncake(self, where: str, record: Any) -> _Request:
        if not isinstance(record, dict) or any(name not in record for name in MOONCAKE):
            raise BadConversation(f"{where}: expected an object with {', '.join(MOONCAKE)}")
        ids = record["hash_ids"]
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**40 for i in ids):
            raise BadConversation(f"{where}: 'hash_ids': expected a list of integers from 0")
        num_prompt = _count(where, "input_length", record["input_length"])
        if -(-num_prompt // self._hash_tokens) != len(ids):
            raise BadConversation(f"{where}: input_length={num_prompt} with {len(ids)} hash_ids: expected one for each "
                                  f"{self._hash_tokens} tokens begun; workload.hash_tokens says how many")  # fmt: skip
        if type(record["timestamp"]) not in (int, float) or not 0 <= record["timestamp"] <= LONGEST_MS:
            raise BadConversation(f"{where}: timestamp={record['timestamp']!r}: expected milliseconds from 0 to "
                                  f"{LONGEST_MS:g}")  # fmt: skip
        num_output = _count(where, "output_length", record["output_length"])
        return _Request(to_ns(record["timestamp"] / 1e3), num_prompt, num_output, np.asarray(ids, dtype=np.int64))

    def _of_csv(self, text: bytes) -> Iterator[_Request]:
        rows = csv.DictReader(text.decode("utf-8", errors="replace").splitlines(), restkey=_BEYOND)
        columns = list(rows.fieldnames or ())
        if missing := [name for name in AZURE if name not in columns]:
            raise BadConversation(f"{self._path}:1: no column {', '.join(missing)}: expected {', '.join(AZURE)}")
        if repeated := [name for name in AZURE if columns.count(name) > 1]:
            raise BadConversation(f"{self._path}:1: {columns.count(repeated[0])} columns {repeated[0]}: expected one")
        for row in _read(rows, self._path):
            where = f"{self._path}:{rows.line_num}"
            if _BEYOND in row:
                num_cells = len(columns) + len(row[_BEYOND])
                raise BadConversation(f"{where}: {num_cells} cells: expected {len(columns)}, one for each column")
            try:
                time_ns = date_ns(row["TIMESTAMP"] or "")
            except ValueError as error:
                raise BadConversation(f"{where}: TIMESTAMP={row['TIMESTAMP']!r}: expected a date and a time") from error
            num_prompt, num_output = (_count(where, name, _whole(row[name])) for name in AZURE[1:])
            yield _Request(time_ns, num_prompt, num_output, ids=None)

    def _turn(self, request: _Request, number: int, vocab_size: int, seed: int) -> Turn:
        texts = np.array([number]) if request.ids is None else request.ids
        length = request.num_prompt if len(texts) == 1 else self._hash_tokens
        words = _words(texts, length, seed)[: request.num_prompt]
        tokens = (mix64(words) % np.uint64(vocab_size)).astype(np.int32)
        num_output = request.num_output if self._most is None else min(request.num_output, self._most)
        params = SamplingParams(max_tokens=num_output, ignore_eos=True)
        return Turn(tokens, params)


def _begins_as_csv(text: bytes) -> bool:
    """Whether the first line names a column of Azure's, in whatever order and quotes."""
    first = text.partition(b"\n")[0].decode("utf-8", errors="replace")
    return bool(set(AZURE) & {cell.strip().strip('"') for cell in first.split(",")})


def _words(texts: np.ndarray, length: int, seed: int) -> np.ndarray:
    """uint64 [n * length]: one for each token of n texts (int64 [n]), of the seed, its text and its place in that."""
    within = np.arange(length, dtype=np.uint64) + np.uint64(seed)
    return (texts.astype(np.uint64)[:, None] * np.uint64(GOLDEN64) + within * _PLACE).ravel()


def _read(rows: "csv.DictReader[str]", path: Path) -> Iterator[dict[str, str | Any]]:
    try:
        yield from rows
    except csv.Error as error:
        raise BadConversation(f"{path}:{rows.line_num + 1}: {error}") from error


def _whole(text: str | None) -> int | str | None:
    """The number that the text is; the text where it is none, or one with more digits than anybody would count to."""
    return int(text) if text is not None and text.isdecimal() and len(text) <= _MOST_DIGITS else text


def _count(where: str, name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_TOKENS:
        raise BadConversation(f"{where}: {name}={value!r}: expected a number of tokens from 1 to {MAX_TOKENS}")
    return value
