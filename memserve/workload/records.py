"""Records: JSON lines with fields of text, for workloads that are no conversations. Errors name file and line."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memserve.workload.conversations import BadConversation, require_text


def iter_records(path: Path, fields: dict[str, type]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of each line that is not blank. fields: that it must have, and the type of each.

    Raises ValueError where there is no such file, BadConversation for a line that is not such an object.
    """
    if not path.is_file():
        raise ValueError(f"workload.path={str(path)!r}: no such file")
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadConversation(f"{where}: invalid UTF-8 at byte {error.start} of the line") from None
        except json.JSONDecodeError as error:
            raise BadConversation(f"{where}: malformed JSON at column {error.colno}: {error.msg}") from None
        if not isinstance(record, dict):
            raise BadConversation(f"{where}: expected a JSON object, got {type(record).__name__}")
        require_fields(where, record, fields)
        yield where, record


def require_fields(where: str, record: object, fields: dict[str, type]) -> None:
    """Raises BadConversation unless `record` is an object with these fields."""
    for name, kind in fields.items():
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, kind):
            raise BadConversation(f"{where}: {name!r} is {type(value).__name__}: expected {kind.__name__}")
        if isinstance(value, str):
            require_text(where, name, value)
