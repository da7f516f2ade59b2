"""Trace files: lines of JSON or CSV, read as they are asked for: the largest are larger than a machine's memory.

A file's life: its first line tells its format -> every line is read by that one, or raises with file and line.
Knows no option but those it is given, and of a format only what its class says.
"""

import codecs
import csv
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from memserve.workload.conversations import BadConversation, names_in, parse_line, require_file
from memserve.workload.trace_formats import CSV_FORMATS, JSON_FORMATS, TraceFormat, TraceRequest, expected

_NO_TEXT = {
    b"\x1f\x8b": "compressed by gzip: expected its text (gunzip -k)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: expected its text (unzstd)",
    b"\xfd7zXZ": "compressed by xz: expected its text (unxz -k)",
    b"PK\x03\x04": "an archive (zip): expected the file in it (unzip)",
    b"PAR1": "Parquet: expected JSON lines or CSV",
    b"version https://git-lfs": "a pointer of Git LFS: expected the file that it stands for (git lfs pull)",
    codecs.BOM_UTF16_LE: "UTF-16: expected UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16: expected UTF-8",
}
_NUMBER = re.compile(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})([eE][+-]?\d{1,3})?", re.ASCII)
_Lines = Iterator[tuple[str, bytes]]


def read_trace(path: Path, hash_tokens: int | None) -> tuple[TraceFormat, Iterator[TraceRequest]]:
    """A file's format, and its requests in its order, read as they are asked for.

    hash_tokens: of the text that a hash id names; None: as many as the format's.
    Raises ValueError for a file that cannot be read, for one without a line, and for `hash_tokens` where there are no
    hash ids; BadConversation for a line that is no request of the format.
    """
    lines = _iter_lines(path)
    first = next(lines, None)
    if first is None:
        raise ValueError(f"{path} holds 0 requests: {expected()}")
    where, line = first
    if line.lstrip().startswith(b"{"):
        found = _of_record(where, parse_line(line, where))
        return found, _of_json(found, chain([first], lines), hash_tokens or found.hash_tokens)
    columns = [cell.strip() for cell in _cells(where, line)]
    found = _of_header(where, columns)
    if hash_tokens is not None:
        raise ValueError(f"hash_tokens={hash_tokens}, but {path} has no hash_ids, as {found.name}'s format: expected "
                         "null")  # fmt: skip
    return found, _of_csv(found, columns, lines)


def _of_record(where: str, record: Any) -> TraceFormat:
    for candidate in JSON_FORMATS:
        if isinstance(record, dict) and candidate.fits(record):
            return candidate()
    raise BadConversation(f"{where}: {expected()}")


def _of_header(where: str, columns: list[str]) -> TraceFormat:
    """The format of a header's columns; the one that has most of them says what is missing."""
    fitting = [candidate for candidate in CSV_FORMATS if candidate.fits(columns)]
    if len(fitting) > 1:
        names = " and ".join(candidate.described() for candidate in fitting)
        raise BadConversation(f"{where}: the columns of {names}: expected those of one")
    nearest = max(CSV_FORMATS, key=lambda candidate: len(set(candidate.fields) & set(columns)))
    missing = [name for name in nearest.fields if name not in columns]
    if len(missing) == len(nearest.fields):
        raise BadConversation(f"{where}: {expected()}")
    if missing:
        raise BadConversation(f"{where}: no column {', '.join(missing)}: expected {nearest.described()}, times in "
                              f"{nearest.time_unit}")  # fmt: skip
    for name in (*nearest.fields, *nearest.optional):
        if columns.count(name) > 1:
            raise BadConversation(f"{where}: {columns.count(name)} columns {name}: expected one")
    return nearest()


def _of_json(found: TraceFormat, lines: _Lines, hash_tokens: int | None) -> Iterator[TraceRequest]:
    for where, line in lines:
        record = parse_line(line, where)
        if not isinstance(record, dict) or not found.fits(record):
            raise BadConversation(f"{where}: expected an object with {found.described()}, as the first line has")
        yield replace(found.request(where, record, hash_tokens), names=names_in(record))


def _of_csv(found: TraceFormat, columns: list[str], lines: _Lines) -> Iterator[TraceRequest]:
    for where, line in lines:
        cells = _cells(where, line)
        if len(cells) != len(columns):
            raise BadConversation(f"{where}: {len(cells)} cells: expected {len(columns)}, one for each column")
        record: dict[str, Any] = {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}
        record |= {name: _number(record[name]) for name in found.fields[:3]}
        yield found.request(where, record, None)


def _iter_lines(path: Path) -> _Lines:
    """("file:line", line) of each line that is not blank, without a byte order mark."""
    require_file("workload.path", path)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = _begun(path, line) if number == 1 else line
                if text.strip():
                    yield f"{path}:{number}", text
    except OSError as error:
        raise ValueError(f"workload.path={str(path)!r}: cannot be read: {error.strerror}") from error


def _begun(path: Path, line: bytes) -> bytes:
    for beginning, what in _NO_TEXT.items():
        if line.startswith(beginning):
            raise ValueError(f"workload.path={str(path)!r}: {what}")
    return line.removeprefix(codecs.BOM_UTF8)


def _cells(where: str, line: bytes) -> list[str]:
    try:
        return next(csv.reader([line.decode("utf-8")], strict=True))
    except UnicodeDecodeError as error:
        raise BadConversation(f"{where}: invalid UTF-8 at byte {error.start} of the line") from None
    except csv.Error as error:
        raise BadConversation(f"{where}: {error}") from error


def _number(text: str) -> int | float | str:
    """The number that a cell is; the text where it is none, or one with more digits than anybody would count to."""
    found = _NUMBER.fullmatch(text)
    if found is None:
        return text
    return int(text) if text.lstrip("+-").isdecimal() else float(text)
