"""Conversation files: ShareGPT's `conversations` and OpenAI's `messages`, as JSON lines or one JSON array.

Knows text and roles; never sees a token. Every error names the file and the line.

    # what one line becomes: [system?] user | assistant | user or tool(s) | assistant | ...
    #                        '--- turn 0 ---'  answer    '--- turn 1 ---'   answer
    # a conversation without any assistant message: each user message is a turn
"""

import codecs
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from memserve.request import require_priority
from memserve.values import as_text
from memserve.workload.classes import RequestClass

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_OPENAI_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}


class BadConversation(ValueError):
    """A conversation that cannot be played, with the file and the line it stands at."""


@dataclass(frozen=True)
class ChatMessage:
    """role: system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class ConversationTurn:
    """What one request adds to its conversation, and the answer that the file has for it (None when it has none)."""

    messages: tuple[ChatMessage, ...]
    answer: str | None


class NamedBy(TypedDict, total=False):
    """Of a Session, what a line names."""

    class_name: str
    priority: int


@dataclass(frozen=True)
class Conversation:
    """where: "file:line", for messages to the user.  names: its `class` and `priority`."""

    conversation_id: str
    turns: tuple[ConversationTurn, ...]
    where: str
    names: Mapping[str, object]


def iter_conversations(path: Path) -> Iterator[Conversation | BadConversation]:
    """The conversations of a file in its order, read as they are asked for; a bad one comes as its error.

    Raises ValueError naming the path when there is no such file, and BadConversation where nothing after a malformed
    place can be read (a JSON array).
    """
    data = read_file("workload.path", path)
    entries = _array_entries(data, path) if data.lstrip().startswith(b"[") else _line_entries(data, path)
    seen: dict[str, str] = {}
    for number, (where, entry) in enumerate(entries):
        try:
            if isinstance(entry, BadConversation):
                raise entry
            conversation = _conversation(entry, number, where)
            if conversation.conversation_id in seen:
                first = seen[conversation.conversation_id]
                raise _bad(where, f"id {conversation.conversation_id!r} is already that of {first}")
        except BadConversation as error:
            yield error
        else:
            seen[conversation.conversation_id] = where
            yield conversation


def read_file(option: str, path: Path) -> bytes:
    """The file's bytes without a byte order mark. Raises ValueError naming option and path if it cannot be read."""
    require_file(option, path)
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ValueError(f"{option}={str(path)!r}: cannot be read: {error.strerror}") from error


def require_file(option: str, path: Path) -> None:
    """Raises ValueError naming option and path unless there is such a file."""
    if not path.is_file():
        what = "is a directory: expected a file" if path.is_dir() else "no such file"
        raise ValueError(f"{option}={str(path)!r}: {what}")


def _bad(where: str, problem: str) -> BadConversation:
    return BadConversation(f"{where}: {problem}")


def iter_lines(data: bytes, path: Path) -> Iterator[tuple[str, bytes]]:
    """("file:line", line) of each line that is not blank."""
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def _line_entries(data: bytes, path: Path) -> Iterator[tuple[str, object]]:
    """("file:line", value or error) of each line that is not blank."""
    for where, line in iter_lines(data, path):
        try:
            yield where, parse_line(line, where)
        except BadConversation as error:
            yield where, error


def parse_line(line: bytes, where: str) -> object:
    """The JSON value of a line. Raises BadConversation where it is none, or one that Python does not read."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _bad(where, f"invalid UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise _bad(where, f"malformed JSON at column {error.colno}: {error.msg}; expected one object a line") from None
    except (RecursionError, ValueError) as error:  # too deep; an integer of too many digits
        raise _bad(where, f"JSON that cannot be read: {error}") from None


def _array_entries(data: bytes, path: Path) -> Iterator[tuple[str, object]]:
    """("file:line", value) of each element; the line is the one on which the element begins."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _bad(f"{path}:{line}", f"invalid UTF-8 at byte {error.start} of the file") from None
    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = _skip_blanks(text, text.index("[") + 1)
    more = not text.startswith("]", position)
    while more:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _bad(f"{path}:{error.lineno}", f"malformed JSON at column {error.colno}: {error.msg}") from None
        except (RecursionError, ValueError) as error:  # as in parse_line
            raise _bad(f"{path}:{line}", f"JSON that cannot be read: {error}") from None
        yield f"{path}:{line}", value
        position = _skip_blanks(text, position)
        more = text.startswith(",", position)
        if more:
            position = _skip_blanks(text, position + 1)
    if text[position:].rstrip() != "]":
        line += text.count("\n", counted, position)
        raise _bad(f"{path}:{line}", "malformed JSON: expected ',' or, at the end of the file, ']'")


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _conversation(entry: object, number: int, where: str) -> Conversation:
    if not isinstance(entry, dict):
        raise _bad(where, f"expected a JSON object, got {type(entry).__name__}")
    conversation_id = entry.get("id", f"{number:05d}")
    if not isinstance(conversation_id, str | int) or isinstance(conversation_id, bool) or conversation_id == "":
        raise _bad(where, f"id={conversation_id!r}: expected a non-empty string or an integer")
    require_text(where, "id", str(conversation_id))
    messages = _messages(entry, where)
    return Conversation(str(conversation_id), _turns(messages, where), where, names_in(entry))


def names_in(entry: Mapping[str, object]) -> dict[str, object]:
    """What of a line's object `named_by` reads."""
    return {name: entry[name] for name in ("class", "priority") if name in entry}


def named_by(where: str, entry: Mapping[str, object], classes: Collection[RequestClass]) -> NamedBy:
    """What a line's object says by its fields `class` and `priority`, where the workload has classes: without, they are
    as good as any other field that nobody reads.
    """
    named = NamedBy()
    if not classes:
        return named
    if "class" in entry:
        if not isinstance(entry["class"], str) or not entry["class"]:
            raise _bad(where, f"class={entry['class']!r}: expected a word, one of workload.classes")
        named["class_name"] = entry["class"]
    if "priority" in entry:
        try:
            named["priority"] = require_priority("priority", entry["priority"])
        except ValueError as error:
            raise _bad(where, str(error)) from None
    return named


def _messages(entry: dict[str, object], where: str) -> list[ChatMessage]:
    """The messages of either format, with OpenAI's role names."""
    if "messages" in entry:
        key, role_key, content_key, roles = "messages", "role", "content", _OPENAI_ROLES
    elif "conversations" in entry:
        key, role_key, content_key, roles = "conversations", "from", "value", _SHAREGPT_ROLES
    else:
        raise _bad(where, f"no 'messages' (OpenAI) and no 'conversations' (ShareGPT) among the keys {sorted(entry)}")
    items = entry[key]
    if not isinstance(items, list):
        raise _bad(where, f"{key!r} is {type(items).__name__}: expected a list of objects")
    messages = []
    for number, item in enumerate(items, start=1):
        here = f"{where}, message {number}"
        if not isinstance(item, dict) or role_key not in item or not (content_key in item or item.get("tool_calls")):
            raise _bad(here, f"expected an object with the keys {role_key!r} and {content_key!r}")
        if not isinstance(item[role_key], str) or item[role_key] not in roles:
            raise _bad(here, f"{role_key}={item[role_key]!r}: expected one of {', '.join(roles)}")
        content = item.get(content_key)
        if content is None and item.get("tool_calls"):
            content = json.dumps(item["tool_calls"])  # an answer that is nothing but calls: its JSON gives its length
        messages.append(ChatMessage(roles[item[role_key]], _text(content, content_key, here)))
    return messages


def _text(content: object, key: str, where: str) -> str:
    content = as_text(content)
    if not isinstance(content, str):
        raise _bad(where, f"{key!r} is {type(content).__name__}: expected a string, or a list of parts of type text")
    require_text(where, key, content)
    return content


def require_text(where: str, key: str, content: str) -> None:
    """Raises BadConversation for half a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _bad(where, f"{key!r} has half a surrogate pair at character {error.start}: not Unicode text") from None


def _turns(messages: list[ChatMessage], where: str) -> tuple[ConversationTurn, ...]:
    """Checks the order of roles and cuts the conversation into turns."""
    num_system = 1 if messages and messages[0].role == "system" else 0
    rest = messages[num_system:]
    if not any(message.role == "user" for message in rest):
        raise _bad(where, "no user turn: expected at least one message of the user")
    answered = any(message.role == "assistant" for message in rest)
    turns: list[ConversationTurn] = []
    pending: list[ChatMessage] = list(messages[:num_system])
    for number, message in enumerate(rest, start=num_system + 1):
        _check_order(messages, number - 1, answered, f"{where}, message {number}")
        if message.role == "assistant":
            turns.append(ConversationTurn(tuple(pending), message.content))
            pending = []
            continue
        if not answered and number > num_system + 1:
            turns.append(ConversationTurn(tuple(pending), None))
            pending = []
        pending.append(message)
    if pending:
        turns.append(ConversationTurn(tuple(pending), None))
    return tuple(turns)


def _check_order(messages: list[ChatMessage], position: int, answered: bool, where: str) -> None:
    """Raises unless the message at `position` may follow the one before it."""
    role = messages[position].role
    before = messages[position - 1].role if position else "start"
    may_follow = {
        "system": (),
        "user": ("start", "system", "assistant") if answered else ("start", "system", "user"),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }[role]
    if before not in may_follow:
        follows = "stands first" if before == "start" else f"follows {before!r}"
        raise _bad(where, f"{role!r} {follows}: expected user and assistant in turn, system only at the start")
