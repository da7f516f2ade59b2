import json

import pytest

from memserve.workload.conversations import BadConversation, Conversation, iter_conversations


def read(path) -> list[Conversation]:
    conversations = list(iter_conversations(path))
    for conversation in conversations:
        if isinstance(conversation, BadConversation):
            raise conversation
    return conversations


def openai(*messages: tuple[str, str], **more) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **more}


def write_lines(path, *entries) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def shape(conversation: Conversation) -> list[tuple[list[str], str | None]]:
    return [([f"{m.role}:{m.content}" for m in turn.messages], turn.answer) for turn in conversation.turns]


def test_openai_lines_become_turns_with_the_files_answers(tmp_path):
    path = tmp_path / "chat.jsonl"
    write_lines(
        path,
        openai(("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), id="one"),
        openai(("user", "x"), ("assistant", "y")),
    )
    first, second = read(path)
    assert shape(first) == [(["system:S", "user:a"], "b"), (["user:c"], None)]
    assert shape(second) == [(["user:x"], "y")]
    assert (first.conversation_id, second.conversation_id) == ("one", "00001")
    assert first.where == f"{path}:1"


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


def test_content_may_be_text_parts_and_nothing_else(tmp_path):
    path = tmp_path / "chat.jsonl"
    write_lines(path, openai(("user", parts("a", "b")), ("assistant", parts("c"))))
    assert [shape(conversation) for conversation in read(path)] == [[(["user:a\nb"], "c")]]
    for content in ([*parts("a"), {"type": "image_url", "image_url": {"url": "x"}}], [], ["a"], parts(7)):
        write_lines(path, openai(("user", content)))
        with pytest.raises(
            BadConversation, match="'content' is list: expected a string, or a list of parts of type text"
        ):
            read(path)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_sharegpt_array_is_read_whatever_its_line_breaks(tmp_path, indent):
    entries = [
        {"id": "q", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"id": 7, "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "c"}]},
    ]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(entries, indent=indent))
    first, second = read(path)
    assert shape(first) == [(["user:a"], "b")]
    assert shape(second) == [(["system:s", "user:c"], None)]
    assert second.conversation_id == "7"
    assert second.where.endswith(":1" if indent is None else ":15")


def test_sharegpt_lines_blank_lines_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "sharegpt.jsonl"
    line = json.dumps({"conversations": [{"from": "human", "value": "é\u2028"}]}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\n\n" + line.encode() + b"\r\n")
    assert [shape(c) for c in read(path)] == [[(["user:é\u2028"], None)]] * 2


def test_without_answers_each_user_message_is_a_turn(tmp_path):
    path = tmp_path / "own.jsonl"
    write_lines(path, openai(("system", "S"), ("user", "a"), ("user", "b"), ("user", "c")))
    assert shape(read(path)[0]) == [(["system:S", "user:a"], None), (["user:b"], None), (["user:c"], None)]


def test_tool_results_are_turns_of_their_own(tmp_path):
    path = tmp_path / "agent.jsonl"
    entry = openai(("user", "a"), ("assistant", "call"), ("tool", "r1"), ("tool", "r2"), ("assistant", "done"))
    write_lines(path, entry)
    assert shape(read(path)[0]) == [(["user:a"], "call"), (["tool:r1", "tool:r2"], "done")]


@pytest.mark.parametrize("content", [{"content": None}, {}], ids=["null", "absent"])
def test_an_answer_that_is_only_tool_calls_counts_as_their_json(tmp_path, content):
    entry = openai(("user", "a"))
    entry["messages"].append({"role": "assistant", **content, "tool_calls": [{"id": 1}]})
    write_lines(tmp_path / "a.jsonl", entry)
    assert shape(read(tmp_path / "a.jsonl")[0]) == [(["user:a"], '[{"id": 1}]')]


GOOD = json.dumps(openai(("user", "a"))).encode()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"messages": [', "malformed JSON"),
        (b"\xff\xfe{}", "invalid UTF-8 at byte 0"),
        (b'"text"', "expected a JSON object, got str"),
        (b'{"text": "a"}', "no 'messages' .* among the keys"),
        (b'{"messages": "a"}', "'messages' is str"),
        (b'{"messages": []}', "no user turn"),
        (b'{"messages": [{"role": "user"}]}', "message 1: expected an object with the keys 'role' and 'content'"),
        (b'{"messages": [{"role": "user", "content": null}]}', "message 1: 'content' is NoneType"),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', "message 1: role='robot': expected one of system"),
        (b'{"messages": [{"role": [], "content": "a"}]}', "message 1: role="),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair at character 0"),
        (b'{"conversations": [{"role": "user", "content": "a"}]}', "keys 'from' and 'value'"),
        (b'{"id": "\\udfff", "messages": [{"role": "user", "content": "a"}]}', "'id' has half a surrogate pair"),
        (b"[" * 100_000, "JSON that cannot be read: maximum recursion depth exceeded"),
        (b'{"id": ' + b"9" * 5000 + b"}", "JSON that cannot be read: Exceeds the limit"),
        (b'{"id": "", "messages": [{"role": "user", "content": "a"}]}', "id=''"),
        (json.dumps(openai(("assistant", "a"))).encode(), "no user turn"),
        (json.dumps(openai(("system", "a"))).encode(), "no user turn"),
        (json.dumps(openai(("assistant", "a"), ("user", "b"))).encode(), "message 1: 'assistant' stands first"),
        (
            json.dumps(openai(("user", "a"), ("assistant", "b"), ("user", "c"), ("user", "d"))).encode(),
            "message 4: 'user' follows 'user'",
        ),
        (json.dumps(openai(("user", "a"), ("system", "b"))).encode(), "message 2: 'system' follows 'user'"),
        (json.dumps(openai(("tool", "a"), ("user", "b"))).encode(), "message 1: 'tool' stands first"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, problem):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(BadConversation, match=problem) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2")


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        (b'[\n{"messages": [{"role": "user", "content": "a"}]},\n{"messages": oops}\n]', 3, "malformed JSON"),
        (b'[\n{"messages": [{"role": "user", "content": "a"}]}\n{}]', 3, "expected ','"),
        (b'[\n{"messages": [{"role": "user", "content": "a"}]}\n', 3, "expected ','"),
        (b'[\n{"messages": [{"role": "user", "content": "a"}]}\n]\n{}', 3, "malformed JSON"),
        (b'[\n{"messages": [{"role": "user", "content": "a"}]},\n]', 3, "malformed JSON"),
        (b'[\n"\xff"]', 2, "invalid UTF-8"),
        (b"[\n" + b"[" * 100_000, 2, "JSON that cannot be read: maximum recursion depth exceeded"),
        (b"[\n1,\n" + b"9" * 5000 + b"]", 3, "JSON that cannot be read: Exceeds the limit"),
        (b'[\n{"messages": [{"role": "user", "content": "a"}]},\n7]', 3, "expected a JSON object, got int"),
    ],
)
def test_a_bad_array_is_named_with_its_file_and_line(tmp_path, text, line, problem):
    path = tmp_path / "bad.json"
    path.write_bytes(text)
    with pytest.raises(BadConversation, match=problem) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{line}:")


def test_an_id_used_twice_is_refused_naming_both_places(tmp_path):
    path = tmp_path / "twice.jsonl"
    write_lines(path, openai(("user", "a"), id="x"), openai(("user", "b"), id="x"))
    with pytest.raises(BadConversation, match=r"twice.jsonl:2: id 'x' is already that of .*twice.jsonl:1"):
        read(path)


def test_empty_files_hold_nothing_and_missing_ones_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "empty.json").write_bytes(b" [ ]\n")
    assert read(tmp_path / "empty.jsonl") == read(tmp_path / "empty.json") == []
    for name, what in (("nowhere.jsonl", "no such file"), (".", "is a directory: expected a file")):
        with pytest.raises(ValueError, match=what):
            read(tmp_path / name)
