"""Classes of requests: drawn beside all else, named by files, and refused where they make no sense."""

import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from memserve.workload import (
    AgentWorkload,
    BadConversation,
    ChatWorkload,
    DocumentQA,
    SessionPlayer,
    SyntheticWorkload,
    TraceWorkload,
    Workload,
)
from memserve.workload.classes import request_classes
from memserve.workload.session import sessions_of

CLASSES = [{"name": "chat", "share": 0.3, "ttft_s": 0.5}, {"name": "batch", "share": 0.7, "priority": 4}]
SAYS = [{"turns": [1, "a"]}, {"class": "chat"}, {"priority": -9}, {"class": "chat", "priority": 2}]


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def lines_of(kind, says):
    """A file's lines of a kind, with what each says beside."""
    own = {
        "chat": lambda i: {"id": f"{i}", "messages": [{"role": "user", "content": "hi"}]},
        "agent": lambda i: {"id": f"{i}", "question": "?",
                            "steps": [{"thought": "a", "action": "b", "observation": "c"}]},
        "docqa": lambda i: {"id": f"{i}", "document": "d", "questions": [{"q": "q", "a": "a"}]},
        "trace": lambda i: {"timestamp": i, "input_length": 5, "output_length": 2, "hash_ids": [i]},
        "bailian": lambda i: {"timestamp": i, "input_length": 5, "output_length": 2, "hash_ids": [i], "chat_id": i,
                              "parent_chat_id": -1},
    }[kind]  # fmt: skip
    return [own(i) | more for i, more in enumerate(says)]


KINDS = {"chat": ChatWorkload, "agent": AgentWorkload, "docqa": DocumentQA, "trace": TraceWorkload,
         "bailian": TraceWorkload}  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS, "synthetic"])
@pytest.mark.parametrize("seed", [0, 7])
def test_classes_change_nothing_but_class_and_priority(kind, seed, tokenizer, tmp_path):
    options = (
        {"num_sessions": 40} if kind == "synthetic" else {"path": written(tmp_path / "f", lines_of(kind, [{}] * 40))}
    )
    make = KINDS.get(kind, SyntheticWorkload)
    plain, classed = (sessions_of(make(**options, classes=c), tokenizer, seed) for c in ((), CLASSES))
    assert {(s.class_name, s.priority) for s in plain} == {("", None)}
    assert {(s.class_name, s.priority) for s in classed} == {("chat", 0), ("batch", 4)}
    for before, after in zip(plain, classed, strict=True):
        same = replace(after, class_name="", priority=None)
        assert (same.session_id, same.arrival_ns, same.chat) == (before.session_id, before.arrival_ns, before.chat)
        for mine, other in zip(before.turns, same.turns, strict=True):
            assert np.array_equal(mine.tokens, other.tokens)
            assert (mine.params, mine.think_time_ns) == (other.params, other.think_time_ns)
    again = sessions_of(make(**options, classes=CLASSES), tokenizer, seed)
    assert [s.class_name for s in again] == [s.class_name for s in classed]


def test_a_class_has_its_share_of_the_sessions_and_more_sessions_change_no_earlier_one(tokenizer):
    few, many = (
        [s.class_name for s in sessions_of(SyntheticWorkload(n, classes=CLASSES, prompt_tokens=1), tokenizer, 3)]
        for n in (100, 4000)
    )
    assert few == many[:100] and many.count("chat") == pytest.approx(0.3 * 4000, rel=0.05)
    other = [s.class_name for s in sessions_of(SyntheticWorkload(100, classes=CLASSES), tokenizer, 4)]
    assert other != few


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_s_own_class_and_priority_go_before_what_is_drawn(kind, tokenizer, tmp_path):
    path = written(tmp_path / "f", lines_of(kind, SAYS))
    never = [CLASSES[0] | {"share": 0}, CLASSES[1] | {"share": 1}]
    sessions = sorted(sessions_of(KINDS[kind](path=path, classes=never), tokenizer, 0), key=lambda s: s.session_id)
    assert [(s.class_name, s.priority) for s in sessions] == [("batch", 4), ("chat", 0), ("batch", -9), ("chat", 2)]
    submits = SessionPlayer(sessions, 10_000).poll(10**18)
    assert {m.request_id.rsplit("/", 1)[0]: (m.class_name, m.priority) for m in submits} == {
        s.session_id: (s.class_name, s.priority) for s in sessions
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("says", "said"),
    [
        ({"priority": "high"}, r"f:2: priority='high': expected an integer in \[-2\*\*31, 2\*\*31\)"),
        ({"priority": None}, r"f:2: priority=None: expected an integer"),
        ({"class": 3}, r"f:2: class=3: expected a word, one of workload.classes"),
        ({"class": ""}, r"f:2: class='': expected a word"),
    ],
)
def test_a_line_with_a_bad_class_or_priority_is_refused_by_file_and_line(kind, says, said, tokenizer, tmp_path):
    path = written(tmp_path / "f", lines_of(kind, [{}, says]))
    with pytest.raises(BadConversation, match=said):
        sessions_of(KINDS[kind](path=path, classes=CLASSES), tokenizer, 0)


def test_the_requests_of_a_trace_s_chat_are_of_one_class(tokenizer, tmp_path):
    lines = lines_of("bailian", [{}] * 60)
    for i, line in enumerate(lines):
        line["parent_chat_id"] = i - 20 if i >= 20 else -1
    sessions = sessions_of(TraceWorkload(written(tmp_path / "f", lines), classes=CLASSES), tokenizer, 0)
    of_chat = {}
    for session in sessions:
        of_chat.setdefault(session.chat, set()).add(session.class_name)
    assert len(of_chat) == 20 and all(len(names) == 1 for names in of_chat.values())
    assert set.union(*of_chat.values()) == {"chat", "batch"}


def test_a_class_that_the_workload_does_not_have_is_refused(tokenizer, tmp_path):
    path = written(tmp_path / "f", lines_of("chat", [{"class": "gold"}]))
    with pytest.raises(ValueError, match=r"class='gold' of session '0': expected one of workload.classes: chat, batch"):
        sessions_of(ChatWorkload(path=path, classes=CLASSES), tokenizer, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_without_classes_a_line_may_say_of_class_and_priority_what_it_likes(kind, tokenizer, tmp_path):
    path = written(tmp_path / "f", lines_of(kind, [{"class": 3, "priority": "high"}, {"class": "gold", "priority": 4}]))
    sessions = sessions_of(KINDS[kind](path=path), tokenizer, 0)
    assert [(s.class_name, s.priority) for s in sessions] == [("", None)] * 2


def test_a_conversation_with_a_bad_class_is_skipped_where_invalid_ones_are(tokenizer, tmp_path):
    path = written(tmp_path / "f", lines_of("chat", [{"class": 3}, {}]))
    workload = ChatWorkload(path=path, classes=CLASSES, skip_invalid=True)
    assert len(sessions_of(workload, tokenizer, 0)) == 1 and workload.figures["skipped_invalid"] == 1


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (
            "chat",
            r"classes='chat': expected a list of mappings with name, share, priority, ttft_s, tpot_s, itl_s, jct_s",
        ),
        (["chat"], r"classes\[0\]='chat': expected a mapping with name"),
        ([{"share": 1}], r"classes\[0\]\.name=None: expected a word"),
        ([{"name": "a"}], r"classes\[0\]\.share=None: expected a number in \[0, 1\]"),
        ([{"name": "a", "share": 1.5}], r"classes\[0\]\.share=1.5: expected a number in \[0, 1\]"),
        (
            [{"name": "a", "share": 0.5}, {"name": "b", "share": 0.4}],
            r"classes: shares that add up to 0.9: expected 1",
        ),
        ([{"name": "a", "share": 0.5}] * 2, r"classes: name='a' of more than one"),
        (
            [{"name": "a", "share": 1, "urgency": 2}],
            r"classes\[0\]\.urgency=2: expected one of name, share, priority",
        ),
        (
            [{"name": "a", "share": 1, "priority": 2**31}],
            r"classes\[0\]\.priority=2147483648: expected an integer in",
        ),
        ([{"name": "a", "share": 1, "priority": 1.5}], r"classes\[0\]\.priority=1.5: expected an integer in"),
        (
            [{"name": "a", "share": 1, "ttft_s": 0}],
            r"classes\[0\]\.ttft_s=0: expected null or seconds in \(0, ",
        ),
    ],
)
def test_classes_that_make_no_sense_are_refused_by_name(classes, said):
    with pytest.raises(ValueError, match=rf"^workload\.{said}"):
        SyntheticWorkload(classes=classes)


def test_a_workload_of_one_s_own_has_classes_if_it_says_so(tokenizer):
    class Mine(Workload):
        classes = request_classes(CLASSES)

        def sessions(self, tokenizer, seed):
            made = SyntheticWorkload(20).sessions(tokenizer, seed)
            return [replace(made[0], class_name="batch", priority=-3), *made[1:]]

    sessions = sessions_of(Mine(), tokenizer, 1)
    assert (sessions[0].class_name, sessions[0].priority) == ("batch", -3)
    assert {s.class_name for s in sessions} == {"chat", "batch"}
    with pytest.raises(ValueError, match=r"priority of session 'synthetic-00000'=True: expected an integer in"):
        replace(sessions[0], priority=True)


def test_a_request_s_class_and_priority_survive_the_wire(tokenizer):
    (submit, *_) = SessionPlayer(sessions_of(SyntheticWorkload(classes=CLASSES), tokenizer, 1), 10_000).poll(10**18)
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(submit), type=type(submit))
    assert decoded == submit and decoded.class_name in ("chat", "batch")
