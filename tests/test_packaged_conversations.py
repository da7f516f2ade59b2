"""The conversations that ship with the package: what the demo and the default workload rely on."""

import json
from collections import Counter
from pathlib import Path

import memserve.workload

LINES = (Path(memserve.workload.__path__[0]) / "data" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
SESSIONS = [json.loads(line) for line in LINES]


def system_prompt(session: dict) -> str | None:
    first = session["messages"][0]
    return first["content"] if first["role"] == "system" else None


def test_about_forty_sessions_with_distinct_ids() -> None:
    assert 40 <= len(SESSIONS) == len({s["id"] for s in SESSIONS})


def test_a_session_is_an_optional_system_prompt_and_three_to_six_user_turns() -> None:
    for session in SESSIONS:
        roles = [m["role"] for m in session["messages"]]
        assert roles[0] in ("system", "user") and set(roles[1:]) == {"user"}
        assert 3 <= roles.count("user") <= 6, session["id"]
        assert all(m["content"].strip() == m["content"] != "" for m in session["messages"])


def test_system_prompts_are_shared_and_differ_in_length() -> None:
    counts = Counter(system_prompt(s) for s in SESSIONS)
    lengths = sorted(len(p.split()) for p in counts if p is not None)
    assert counts[None] >= 5 and min(counts.values()) >= 3
    assert len(lengths) >= 4 and lengths[0] < 20 and lengths[-1] > 200


def test_the_first_eight_sessions_already_share_the_long_prompt() -> None:
    first = Counter(system_prompt(s) for s in SESSIONS[:8])
    assert max(first, key=lambda p: len(p or "")) in [p for p, n in first.items() if n >= 2]


def test_no_conversation_outgrows_an_8k_context() -> None:
    words = max(sum(len(m["content"].split()) for m in s["messages"]) for s in SESSIONS)
    assert words < 1000  # under 2000 tokens of English, which leaves 1000 for each of six answers
