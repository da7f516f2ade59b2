"""Formats of traces: each is known by its own fields, and its unit of time is no other's."""

import json

import pytest

from memserve.workload import BadConversation, TraceWorkload

BAILIAN = [
    {"chat_id": 159, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 40, "output_length": 132,
     "type": "text", "turn": 1, "hash_ids": [7, 8, 9]},
    {"chat_id": 161, "parent_chat_id": -1, "timestamp": 62, "input_length": 16, "output_length": 3,
     "type": "search", "turn": 1, "hash_ids": [10]},
    {"chat_id": 163, "parent_chat_id": 159, "timestamp": 63.614, "input_length": 64, "output_length": 1,
     "type": "text", "turn": 2, "hash_ids": [7, 8, 11, 7]},
]  # fmt: skip
MOONCAKE = {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": list(range(46, 60))}
BURST_1 = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,1087,230,1317,API log
"""
BURST_2 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,1722ac82-0a46,43,GPT-4,906,446,1352,Conversation log
19440161.0,,2,ChatGPT,36,29,65,API log
19440192.25,1722ac82-0a46,8,GPT-4,1779,123,1902,Conversation log
"""
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n4.314579,396,109\n"
AZURE_2023 = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47,7,4\n"
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:01+00:00,2399,6
2024-05-10 02:00:02+02:00,76,15
"""
AZURE_2025 = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:00.5,2,900,120\n"


class Tokenizer:
    vocab_size = 256


def in_lines(*records):
    return "\n".join(map(json.dumps, records)) + "\n"


@pytest.fixture
def play(tmp_path):
    """The sessions that a file of such a text gives, and what its workload says of them."""

    def played(text, **options):
        path = tmp_path / "trace"
        path.write_text(text)
        workload = TraceWorkload(str(path), **options)
        return workload.sessions(Tokenizer, 0), dict(workload.figures)

    return played


@pytest.mark.parametrize(
    ("text", "name", "unit", "hash_tokens", "arrivals_s", "lengths"),
    [
        (in_lines(MOONCAKE, {**MOONCAKE, "timestamp": 30535}), "Mooncake", "ms", 512, [0, 3.053], [(6955, 52)] * 2),
        (in_lines(*BAILIAN), "Qwen-Bailian", "s", 16, [0, 0.886, 2.5], [(40, 132), (16, 3), (64, 1)]),
        (AZURE_2023, "Azure", "dates", None, [0, 0.31941], [(374, 44), (7, 4)]),
        (AZURE_2024, "Azure", "dates", None, [0, 0.99007, 1.99007], [(2162, 5), (2399, 6), (76, 15)]),
        (AZURE_2025, "Azure", "dates", None, [0], [(900, 120)]),
        (BURST_1, "BurstGPT", "s", None, [0, 40.5], [(472, 18), (1087, 230)]),
        (BURST_2, "BurstGPT", "s", None, [0, 51, 82.25], [(906, 446), (36, 29), (1779, 123)]),
        (VIDUR, "Vidur", "s", None, [0, 4.314579], [(374, 44), (396, 109)]),
    ],
)
def test_a_format_is_known_and_its_times_and_lengths_are_the_file_s(
    play, text, name, unit, hash_tokens, arrivals_s, lengths
):
    sessions, figures = play(text)
    assert [s.arrival_ns for s in sessions] == [round(1e9 * arrival) for arrival in arrivals_s]
    assert [(len(s.turns[0].tokens), s.turns[0].params.max_tokens) for s in sessions] == lengths
    assert figures == {"format": name, "time_unit": unit, "hash_tokens": hash_tokens, "skipped_empty": 0,
                       "span_s": pytest.approx(arrivals_s[-1])}  # fmt: skip


def test_an_id_of_bailian_s_is_16_tokens_the_last_one_perhaps_fewer(play):
    first, other, second = (session.turns[0].tokens for session in play(in_lines(*BAILIAN))[0])
    assert (first[:32] == second[:32]).all() and (second[48:] == first[:16]).all()
    assert (first[32:] == second[32:40]).mean() < 0.5 and (other == first[:16]).mean() < 0.5


def of_chat(chat_id, parent):
    return {**BAILIAN[0], "chat_id": chat_id, "parent_chat_id": parent}


def test_requests_of_a_chat_are_one_session_to_who_routes_and_the_others_their_own(play):
    after = {**BAILIAN[2], "chat_id": 170, "parent_chat_id": 163, "timestamp": 99.0}
    orphans = [{**after, "chat_id": chat_id, "parent_chat_id": 5} for chat_id in (180, 181)]
    chats = [session.chat for session in play(in_lines(*BAILIAN, after, *orphans))[0]]
    assert chats == ["chat-159", "chat-161", "chat-159", "chat-159", "chat-5", "chat-5"]
    assert [session.chat for session in play(BURST_2)[0]] == ["chat-1722ac82-0a46", None, "chat-1722ac82-0a46"]
    assert [session.chat for session in play(BURST_1)[0]] == [None, None]


def test_a_parent_may_come_later_or_be_none_of_the_file_s(play):
    lines = [of_chat(7, 8), of_chat(9, 7), of_chat(8, 5), of_chat(10, 8), of_chat(11, -1)]
    chats = [session.chat for session in play(in_lines(*lines))[0]]
    assert chats == ["chat-8", "chat-8", "chat-5", "chat-5", "chat-11"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (in_lines(MOONCAKE, BAILIAN[0]), "trace:2: expected an object with .* no chat_id or parent_chat_id .Mooncake"),
        (in_lines(BAILIAN[0], MOONCAKE), "trace:2: expected an object with .*parent_chat_id .Qwen-Bailian"),
        (in_lines({**MOONCAKE, "chat_id": 3}), "trace:1: expected an object with"),
        (in_lines({**MOONCAKE, "timestamp": -61.1}), "timestamp=-61.1: expected milliseconds from 0"),
        (in_lines({**BAILIAN[0], "timestamp": 7_200_000}), "timestamp=7200000: expected seconds from 0 to 2.6784e"),
        (in_lines({**BAILIAN[0], "hash_ids": [7]}), "input_length=40 with 1 hash_ids: expected one for each 16 tokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n19440110,3,4\n", "TIMESTAMP=19440110: expected a date and a time"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,3,4\n", "TIMESTAMP='2023-11-16': expected a date and"),
        ("Timestamp,Request tokens,Response tokens\n2023-11-16 18:15:46,3,4\n", "Timestamp='2023.*: expected seconds"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n-1,3,4\n", "arrived_at=-1: expected seconds from 0"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\nnan,3,4\n", "arrived_at='nan': expected seconds"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n1e300,3,4\n", "arrived_at=1e.300: expected seconds"),
        ("num_prefill_tokens,num_decode_tokens,pd_ratio\n3,4,1\n", "trace:1: no column arrived_at: .*times in s"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens,Timestamp,Request tokens,Response tokens\n",
         "trace:1: the columns of .*BurstGPT.* and .*Vidur.*: expected those of one"),
        ("Timestamp,Session ID,Request tokens,Response tokens,Session ID\n", "trace:1: 2 columns Session ID"),
        (in_lines({**BAILIAN[0], "parent_chat_id": "x"}), "parent_chat_id='x': expected an integer from -1"),
        (in_lines({**BAILIAN[0], "chat_id": -1}), "chat_id=-1: expected an integer from 0"),
        (in_lines(*BAILIAN, BAILIAN[0]), "trace:4: chat_id=159, as on an earlier line: expected one of its own"),
        (in_lines(of_chat(7, 7)), "trace:1: parent_chat_id=7 leads back to chat_id=7: expected that of the"),
        (in_lines(of_chat(7, 8), of_chat(8, 7)), "trace:2: parent_chat_id=7 leads back to chat_id=8"),
        (in_lines(of_chat(7, 8), of_chat(9, 7), of_chat(8, 5), of_chat(5, 9)), "trace:4: parent_chat_id=9 leads back"),
    ],
)  # fmt: skip
def test_what_is_of_two_formats_or_of_none_or_in_another_unit_is_refused_by_its_place(play, text, named):
    with pytest.raises(BadConversation, match=named):
        play(text)


def test_tokens_of_a_hash_id_may_be_others_than_the_format_s_where_there_are_ids(play):
    sessions, figures = play(in_lines({**BAILIAN[0], "hash_ids": [7, 8]}), hash_tokens=32)
    assert len(sessions[0].turns[0].tokens) == 40 and figures["hash_tokens"] == 32
    with pytest.raises(ValueError, match=r"hash_tokens=512, but .* has no hash_ids, as Vidur's format: expected null"):
        play(VIDUR, hash_tokens=512)


FAILURES = "5,ChatGPT,0,0,0,API log\n6,ChatGPT,12,0,12,API log\n7,ChatGPT,0,3,3,API log\n"


@pytest.mark.parametrize(
    ("text", "num_kept", "named"),
    [
        (BURST_1 + FAILURES, 2, "trace:4: Request tokens=0: .*workload.skip_empty=true leaves such requests out"),
        (VIDUR + "5.0,7,0\n6.0,0,7\n7.0,0,0\n", 2, "trace:4: num_decode_tokens=0: .*skip_empty=true"),
        (AZURE_2023 + "".join(f"2023-11-16 18:15:48,{n}\n" for n in ("0,3", "3,0", "0,0")), 2, "ContextTokens=0"),
        (in_lines(MOONCAKE, {**MOONCAKE, "output_length": 0}, {**MOONCAKE, "input_length": 0, "hash_ids": []},
                  {**MOONCAKE, "input_length": 0}), 1, "trace:2: output_length=0"),
        (in_lines(*BAILIAN, *({**BAILIAN[1], "chat_id": n, name: 0} for n, name in
                              ((7, "input_length"), (8, "output_length"), (9, "output_length")))), 3, "input_length=0"),
    ],
)  # fmt: skip
def test_requests_without_a_prompt_or_an_answer_are_refused_or_left_out_and_counted(play, text, num_kept, named):
    with pytest.raises(BadConversation, match=named):
        play(text)
    sessions, figures = play(text, skip_empty=True)
    assert (len(sessions), figures["skipped_empty"]) == (num_kept, 3)
    assert min(session.arrival_ns for session in sessions) == 0
    assert play(text, skip_empty=True, num_sessions=1)[1]["skipped_empty"] == 0  # the rest was not looked at


def test_a_request_that_is_left_out_is_still_of_its_chat(play):
    failed = {**BAILIAN[2], "output_length": 0}
    after = {**BAILIAN[2], "chat_id": 170, "parent_chat_id": 163}
    assert [s.chat for s in play(in_lines(*BAILIAN[:2], failed, after), skip_empty=True)[0]][-1] == "chat-159"


def test_a_trace_of_nothing_but_failures_says_so(play):
    with pytest.raises(ValueError, match=r"holds 0 requests \(3 skipped\)"):
        play(BURST_1.partition("\n")[0] + "\n" + FAILURES, skip_empty=True)
