"""Records: JSON lines with fields of text, for workloads that are no conversations. Errors name file and line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memserve.workload.conversations import BadConversation, iter_lines, parse_line, read_file, require_text


def iter_records(path: Path, fields: dict[str, type]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of each line that is not blank. fields: that it has beside its `id`, and their types.

    Raises ValueError where there is no such file, BadConversation for a line that is not such an object or has
    an earlier one's id.
    """
    seen: dict[str, str] = {}
    for where, line in iter_lines(read_file("workload.path", path), path):
        record = parse_line(line, where)
        if not isinstance(record, dict):
            raise BadConversation(f"{where}: expected a JSON object, got {type(record).__name__}")
        require_fields(where, record, {"id": str, **fields})
        if record["id"] in seen:
            raise BadConversation(f"{where}: id {record['id']!r} is already that of {seen[record['id']]}")
        seen[record["id"]] = where
        yield where, record


def require_fields(where: str, record: object, fields: dict[str, type]) -> None:
    """Raises BadConversation unless `record` is an object with these fields, lists of at least one item."""
    for name, kind in fields.items():
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, kind):
            raise BadConversation(f"{where}: {name!r} is {type(value).__name__}: expected {kind.__name__}")
        if value == []:
            raise BadConversation(f"{where}: {name!r} is empty: expected at least one")
        if isinstance(value, str):
            require_text(where, name, value)


def require_enough(num_sessions: int | None, num_found: int, held: str) -> None:
    """Raises ValueError unless there are so many sessions as were asked for, or one. held: what the file has."""
    if num_found < (num_sessions or 1):
        if num_sessions is None:
            raise ValueError(f"at least one session, but {held}")
        raise ValueError(f"num_sessions={num_sessions}, but {held}: expected no more than there are")
