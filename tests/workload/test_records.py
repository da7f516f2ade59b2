import json

import numpy as np
import pytest

from memserve.workload import AgentWorkload, BadConversation, ChatWorkload, DocumentQA


def text_of(tokens):
    return bytes(tokens.astype(np.uint8)).decode()


def test_an_agents_step_is_a_request_behind_everything_before_it(tokenizer):
    first, *_ = AgentWorkload().sessions(tokenizer, 0)
    texts = [text_of(turn.tokens) for turn in first.turns]
    assert texts[0].startswith("Answer the question") and texts[0].endswith("Vane, is deeper?\nThought 1:")
    assert texts[1] == "\nObservation 1: Esk harbour has 11 metres at low water.\nThought 2:"
    assert len(texts) == 3 and first.turns[2].params.max_tokens == len(" Vane is deeper.\nAction 3: Finish[Vane]")
    output = np.arange(4, dtype=np.int32)
    prompt = first.next_prompt(first.turns[0].tokens, output, 1)
    assert prompt.tolist() == [*first.turns[0].tokens.tolist(), *output.tolist(), *first.turns[1].tokens.tolist()]


def test_all_agents_share_the_few_shot_prompt(tokenizer):
    firsts = [text_of(s.turns[0].tokens) for s in AgentWorkload(max_turns=1).sessions(tokenizer, 0)]
    assert len({t[: t.rindex("Question")] for t in firsts}) == 1 and len(set(firsts)) == 3


def test_a_documents_questions_are_sessions_that_share_its_beginning(tokenizer):
    sessions = DocumentQA(document_tokens=50, questions=2).sessions(tokenizer, 0)
    assert len(sessions) == 6 and len({s.session_id for s in sessions}) == 6
    beginnings = {text_of(s.turns[0].tokens[:50]) for s in sessions}
    assert len(beginnings) == 3
    assert all(text_of(s.turns[0].tokens[50:]).startswith("\nQuestion: ") for s in sessions)
    assert sorted(s.turns[0].params.max_tokens for s in sessions)[0] == len(" Sixty.")


def test_equal_seeds_give_equal_sessions_and_another_seed_another_order(tokenizer):
    ids = [[s.session_id for s in DocumentQA().sessions(tokenizer, seed)] for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2] and sorted(ids[1]) == sorted(ids[2])


@pytest.mark.parametrize("kind", [AgentWorkload, DocumentQA])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "file.jsonl:2: malformed JSON"),
        ("[]", "file.jsonl:2: expected a JSON object"),
        ("{}", "'id' is NoneType"),
        ("[" * 100_000, "file.jsonl:2: JSON that cannot be read: maximum recursion depth"),
        ("9" * 5000, "file.jsonl:2: JSON that cannot be read: Exceeds the limit"),
    ],
)
def test_a_bad_line_is_named(kind, line, message, tokenizer, tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(BadConversation, match=message):
        kind(str(path)).sessions(tokenizer, 0)


def test_a_bad_step_or_question_is_named(tokenizer, tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text(
        json.dumps({"id": "a", "question": "?", "steps": [{"thought": 3}], "document": "", "questions": [4]})
    )
    with pytest.raises(BadConversation, match="file.jsonl:1, step 1: 'thought' is int: expected str"):
        AgentWorkload(str(path)).sessions(tokenizer, 0)
    with pytest.raises(BadConversation, match="file.jsonl:1, question 1: 'q' is NoneType"):
        DocumentQA(str(path)).sessions(tokenizer, 0)


STEP = {"thought": "t", "action": "a", "observation": "o"}
RECORD = {"id": "a", "question": "?", "steps": [STEP], "document": "", "questions": [{"q": "?", "a": "!"}]}


@pytest.mark.parametrize(("kind", "turns"), [(AgentWorkload, "steps"), (DocumentQA, "questions")])
def test_an_id_used_twice_and_a_record_without_turns_are_named(kind, turns, tokenizer, tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text(f"{json.dumps(RECORD)}\n\n{json.dumps(RECORD)}\n")
    with pytest.raises(BadConversation, match=r"file.jsonl:3: id 'a' is already that of .*file.jsonl:1"):
        kind(str(path)).sessions(tokenizer, 0)
    path.write_text(json.dumps(RECORD | {turns: []}))
    with pytest.raises(BadConversation, match=f"file.jsonl:1: '{turns}' is empty: expected at least one"):
        kind(str(path)).sessions(tokenizer, 0)


@pytest.mark.parametrize("kind", [AgentWorkload, DocumentQA])
def test_too_few_and_no_file_are_refused(kind, tokenizer):
    with pytest.raises(ValueError, match="num_sessions=1000, but"):
        kind(num_sessions=1000).sessions(tokenizer, 0)
    with pytest.raises(ValueError, match="nowhere"):
        kind("nowhere").sessions(tokenizer, 0)


def test_a_prompt_that_is_no_text_and_an_empty_file_are_named(tokenizer, tmp_path):
    prompt, empty = tmp_path / "prompt.txt", tmp_path / "empty.jsonl"
    prompt.write_bytes(b"Thought\xff")
    with pytest.raises(ValueError, match=r"workload.prompt_path='.*prompt.txt': invalid UTF-8 at byte 7 of the file"):
        AgentWorkload(prompt_path=str(prompt)).sessions(tokenizer, 0)
    empty.write_bytes(b"")
    for kind in (AgentWorkload, DocumentQA, ChatWorkload):
        with pytest.raises(ValueError, match=r"at least one session, but .*empty.jsonl holds 0"):
            kind(str(empty)).sessions(tokenizer, 0)


def test_the_real_files_play(tokenizer, shared_workloads):
    agents = AgentWorkload(
        str(shared_workloads / "agent_react_hotpotqa.jsonl"), str(shared_workloads / "react_prompt.txt")
    ).sessions(tokenizer, 0)
    assert len(agents) == 140 and min(len(s.turns) for s in agents) >= 1
    questions = DocumentQA(str(shared_workloads / "docqa_loogle.jsonl"), questions=100).sessions(tokenizer, 0)
    assert len(questions) > 100 and all(len(s.turns[0].tokens) > 1000 for s in questions)


def test_a_line_may_hold_any_separator_but_a_newline_and_one_that_is_no_text_is_named(tokenizer, tmp_path):
    path = tmp_path / "documents.jsonl"
    record = {"id": "a\u2028b", "document": "two\x85pages", "questions": [{"q": "Which?", "a": "Both."}]}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    (session,) = DocumentQA(path=str(path), document_tokens=8).sessions(tokenizer, 0)
    assert session.session_id.startswith("a\u2028b")
    path.write_bytes(path.read_bytes() + b"\xff\n")
    with pytest.raises(BadConversation, match=r"documents\.jsonl:2: invalid UTF-8 at byte 0"):
        DocumentQA(path=str(path)).sessions(tokenizer, 0)
    record["questions"][0]["q"] = "\ud83d?"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(BadConversation, match=r"question 1: 'q' has half a surrogate pair at character 0"):
        DocumentQA(path=str(path)).sessions(tokenizer, 0)
