import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from memserve.model.byte_tokenizer import ByteTokenizer
from memserve.model.chat_format import ChatTemplateError
from memserve.workload.arrivals import ClosedLoop, Gamma
from memserve.workload.chat import ChatWorkload
from memserve.workload.conversations import BadConversation
from memserve.workload.player import SessionPlayer


def write(path: Path, *conversations: list[tuple[str, str]]) -> str:
    lines = [
        json.dumps({"id": f"c{n}", "messages": [{"role": role, "content": content} for role, content in messages]})
        for n, messages in enumerate(conversations)
    ]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def chat_file(tmp_path) -> str:
    return write(
        tmp_path / "chat.jsonl",
        [("system", "S"), ("user", "one"), ("assistant", "1234567"), ("user", "two"), ("assistant", "")],
        [("user", "x"), ("assistant", "y")],
        [("user", "a"), ("assistant", "b"), ("tool", "t1"), ("tool", "t2"), ("assistant", "c")],
    )


def text(token_ids: np.ndarray) -> str:
    return bytes(int(t) for t in token_ids if t < 256).decode()


def test_the_packaged_conversations_need_no_path(tokenizer):
    sessions = ChatWorkload(rate=2.0, num_sessions=5).sessions(tokenizer, seed=0)
    assert len(sessions) == 5
    assert all(len(session.turns) >= 2 for session in sessions)


def test_a_conversation_becomes_prompt_and_turns_without_the_files_answers(tokenizer, chat_file):
    first = ChatWorkload(path=chat_file, think_time_s=1.5, max_output_tokens=9).sessions(tokenizer, seed=0)[0]
    assert first.session_id == "c0"
    assert [turn.think_time_ns for turn in first.turns] == [0, 1_500_000_000]
    assert [turn.params.max_tokens for turn in first.turns] == [9, 9]
    assert text(first.turns[0].tokens) == "S\none\n" and text(first.turns[1].tokens) == "two\n"
    assert first.suffix.tolist() == tokenizer.turn_suffix.tolist()


def test_answers_take_the_files_lengths_on_request(tokenizer, chat_file):
    workload = ChatWorkload(path=chat_file, output_length="from_file", max_output_tokens=5)
    first, second, _ = workload.sessions(tokenizer, seed=0)
    assert [turn.params.max_tokens for turn in first.turns] == [5, 1]  # 7 tokens cut at 5; 0 raised to 1
    assert second.turns[0].params.max_tokens == 1


@pytest.mark.parametrize(
    ("length", "said", "ignores"),
    [("free", None, False), ("free", True, True), ("from_file", None, True), ("from_file", False, False)],
)
def test_an_answer_of_the_file_s_length_is_not_ended_by_a_token_unless_that_is_said(
    tokenizer, chat_file, length, said, ignores
):
    sessions = ChatWorkload(path=chat_file, output_length=length, ignore_eos=said).sessions(tokenizer, seed=0)
    assert {turn.params.ignore_eos for session in sessions for turn in session.turns} == {ignores}


def test_a_missing_answer_has_no_length(tokenizer, tmp_path):
    path = write(tmp_path / "open.jsonl", [("user", "x"), ("assistant", "y"), ("user", "z")])
    with pytest.raises(BadConversation, match=r"open.jsonl:1, turn 2: no answer"):
        ChatWorkload(path=path, output_length="from_file").sessions(tokenizer, seed=0)


def test_a_missing_answer_is_skipped_on_request_and_made_up_for_from_later_lines(tokenizer, tmp_path, caplog):
    answered, still_open = [("user", "x"), ("assistant", "y")], [("user", "x"), ("assistant", "y"), ("user", "z")]
    path = write(tmp_path / "open.jsonl", answered, still_open, answered, answered)
    options = {"path": path, "output_length": "from_file", "skip_invalid": True, "num_sessions": 2}
    sessions = ChatWorkload(**options).sessions(tokenizer, seed=0)
    assert [session.session_id for session in sessions] == ["c0", "c2"]
    assert "1 conversations skipped, 2 kept" in caplog.text and "open.jsonl:2, turn 2: no answer" in caplog.text
    played = ChatWorkload(**options, max_turns=1).sessions(tokenizer, seed=0)  # what is not played needs no answer
    assert [session.session_id for session in played] == ["c0", "c1"]


def test_tool_results_reach_the_template_as_the_user_or_as_tools(tokenizer, chat_file):
    as_user = ChatWorkload(path=chat_file).sessions(tokenizer, seed=0)[2].turns[1].tokens
    assert as_user[1] == 259 and text(as_user) == "t1\n\nt2\n"
    as_tool = ChatWorkload(path=chat_file, tool_role="tool").sessions(tokenizer, seed=0)[2].turns[1].tokens
    assert as_tool[1] == 261 and text(as_tool) == "t1\nt2\n"


def test_a_chat_format_without_tools_is_refused_by_the_name_of_the_option_and_only_for_their_role(chat_file):
    workload = ChatWorkload(path=chat_file, tool_role="tool")
    expected = "workload.tool_role=tool: role 'tool': the byte tokenizer's chat format has .* alone; expected user"
    with pytest.raises(ValueError, match=expected):
        workload.sessions(ByteTokenizer(), seed=0)
    assert len(ChatWorkload(path=chat_file).sessions(ByteTokenizer(), seed=0)) == 3

    class RewritesHistory(ByteTokenizer):
        def next_turn(self, messages):
            raise ChatTemplateError("rewrites history")

    with pytest.raises(ChatTemplateError, match=r"^rewrites history$"):
        workload.sessions(RewritesHistory(), seed=0)


def test_num_sessions_and_max_turns_take_the_first_ones(tokenizer, chat_file):
    sessions = ChatWorkload(path=chat_file, num_sessions=2, max_turns=1).sessions(tokenizer, seed=0)
    assert [(session.session_id, len(session.turns)) for session in sessions] == [("c0", 1), ("c1", 1)]


def test_more_sessions_than_the_file_holds_is_an_error_naming_both(tokenizer, chat_file):
    with pytest.raises(ValueError, match=r"num_sessions=4, but .*chat.jsonl holds 3 conversations"):
        ChatWorkload(path=chat_file, num_sessions=4).sessions(tokenizer, seed=0)


def test_an_empty_file_is_an_error(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="at least one session, but .* holds 0"):
        ChatWorkload(path=write(tmp_path / "empty.jsonl")).sessions(tokenizer, seed=0)


def test_a_bad_conversation_stops_the_run_unless_skipping_is_asked_for(tokenizer, tmp_path, caplog):
    path = write(tmp_path / "some.jsonl", [("user", "a")], [("assistant", "b")], [("user", "c")])
    with pytest.raises(BadConversation, match=r"some.jsonl:2: no user turn"):
        ChatWorkload(path=path).sessions(tokenizer, seed=0)
    with caplog.at_level(logging.WARNING):
        workload = ChatWorkload(path=path, skip_invalid=True)
        sessions = workload.sessions(tokenizer, seed=0)
    assert [session.session_id for session in sessions] == ["c0", "c2"] and workload.figures == {"skipped_invalid": 1}
    assert "1 conversations skipped, 2 kept" in caplog.text and "some.jsonl:2" in caplog.text


def test_equal_seeds_give_equal_sessions_and_others_other_arrivals(tokenizer, chat_file):
    def arrivals(seed: int) -> list[int]:
        return [s.arrival_ns for s in ChatWorkload(path=chat_file, arrivals=Gamma()).sessions(tokenizer, seed)]

    assert arrivals(3) == arrivals(3) != arrivals(4)
    assert arrivals(3) == sorted(arrivals(3))


def test_a_closed_loop_passes_its_concurrency_on(tokenizer, chat_file):
    workload = ChatWorkload(path=chat_file, rate=None, arrivals=ClosedLoop(concurrency=2))
    player = SessionPlayer(workload.sessions(tokenizer, seed=0), 1000, workload.concurrency)
    assert [submit.request_id for submit in player.poll(0)] == ["c0/0", "c1/0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sessions": 0}, "num_sessions=0: expected an integer >= 1"),
        ({"num_sessions": 2.5}, "num_sessions=2.5"),
        ({"rate": math.nan}, "rate=nan"),
        ({"rate": -1}, "rate=-1"),
        ({"rate": None}, "rate=None with arrivals=Poisson"),
        ({"arrivals": ClosedLoop()}, "rate=1.0 with arrivals=ClosedLoop"),
        ({"arrivals": "gamma"}, "arrivals='gamma': expected an object of Arrivals"),
        ({"think_time_s": -0.1}, "think_time_s=-0.1"),
        ({"think_time_s": math.nan}, "think_time_s=nan"),
        ({"max_output_tokens": 0}, "max_output_tokens=0"),
        ({"max_turns": 0}, "max_turns=0"),
        ({"output_length": "file"}, "output_length='file': expected one of free, from_file"),
        ({"tool_role": "robot"}, "tool_role='robot'"),
        ({"skip_invalid": "yes"}, "skip_invalid='yes': expected true or false"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"ignore_eos": 1}, "ignore_eos=1"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        ChatWorkload(**options)


@pytest.mark.parametrize(
    ("name", "num_sessions", "num_turns"),
    [("chat_seed_dialogs", 966, 2333), ("chat_mtbench", 160, 320), ("agent_tau_airline", 200, 2454)],
)
def test_the_shared_files_are_read_whole(tokenizer, shared_workloads, name, num_sessions, num_turns):
    sessions = ChatWorkload(path=str(shared_workloads / f"{name}.jsonl")).sessions(tokenizer, seed=0)
    assert len(sessions) == num_sessions
    assert sum(len(session.turns) for session in sessions) == num_turns
