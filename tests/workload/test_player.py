import dataclasses
import itertools

import numpy as np
import pytest

from memserve.messages import Finished, Tokens, pack_times, pack_tokens, unpack_tokens
from memserve.request import FinishReason
from memserve.sampling_params import SamplingParams
from memserve.workload.player import SessionPlayer
from memserve.workload.session import Session, Turn

SUFFIX = np.array([900, 901], dtype=np.int32)


def make_session(
    name: str, arrival_ns: int = 0, num_turns: int = 3, num_new: int = 4, think_time_ns: int = 0
) -> Session:
    params = SamplingParams(max_tokens=2)
    turns = tuple(
        Turn(np.full(num_new, 100 + k, dtype=np.int32), params, think_time_ns if k else 0) for k in range(num_turns)
    )
    return Session(name, arrival_ns, turns, SUFFIX, eos_token_ids=(900,))


def tokens(request_id: str, index: int, *token_ids: int) -> Tokens:
    times = np.zeros(len(token_ids), dtype=np.int64)
    return Tokens(request_id, 0, index, pack_tokens(np.array(token_ids)), pack_times(times))


def finished(request_id: str, reason: FinishReason = FinishReason.LENGTH) -> Finished:
    return Finished(request_id, 0, reason, "", None)


def answer(player: SessionPlayer, request_id: str, now_ns: int, *token_ids: int) -> None:
    player.receive(tokens(request_id, 0, *token_ids), now_ns)
    player.receive(finished(request_id), now_ns)


def play(player: SessionPlayer, latency_ns: int) -> list[tuple[int, str, list[int]]]:
    """Plays to the end against a server that answers [1, 2] to everything after `latency_ns`."""
    log, answers, ticks = [], [], itertools.count()
    while not player.done:
        due_ns = player.next_time_ns()
        if answers and (due_ns is None or answers[0][0] <= due_ns):
            now_ns, _, request_id = answers.pop(0)
            answer(player, request_id, now_ns, 1, 2)
            continue
        for submit in player.poll(due_ns):
            log.append((submit.arrival_ns, submit.request_id, unpack_tokens(submit.tokens).tolist()))
            answers.append((due_ns + latency_ns, next(ticks), submit.request_id))
    return log


def test_a_turn_waits_for_the_answer_before_it_and_for_the_think_time():
    player = SessionPlayer([make_session("a", arrival_ns=50, num_turns=2, think_time_ns=7)], max_context=100)
    assert player.next_time_ns() == 50
    assert player.poll(49) == []
    assert [s.request_id for s in player.poll(50)] == ["a/0"]
    assert player.next_time_ns() is None and not player.done
    answer(player, "a/0", 1000, 5, 6)
    assert player.next_time_ns() == 1007
    (submit,) = player.poll(1007)
    assert (submit.request_id, submit.session_id, submit.arrival_ns) == ("a/1", "a", 1007)
    assert unpack_tokens(submit.tokens).tolist() == [100] * 4 + [5, 6, 900, 901] + [101] * 4
    answer(player, "a/1", 2000, 5, 900)
    assert player.done and player.next_time_ns() is None


def test_a_late_poll_keeps_the_time_at_which_the_request_was_due():
    player = SessionPlayer([make_session("a", arrival_ns=50)], max_context=100)
    assert player.poll(80)[0].arrival_ns == 50


def test_history_grows_by_the_answers_and_a_generated_end_of_turn_is_not_doubled():
    player = SessionPlayer([make_session("a", num_new=1)], max_context=100)
    player.poll(0)
    answer(player, "a/0", 1, 5, 900)
    assert unpack_tokens(player.poll(1)[0].tokens).tolist() == [100, 5, 900, 901, 101]
    answer(player, "a/1", 2, 6)
    assert unpack_tokens(player.poll(2)[0].tokens).tolist() == [100, 5, 900, 901, 101, 6, 900, 901, 102]


def test_tokens_that_come_twice_or_in_pieces_enter_the_history_once():
    player = SessionPlayer([make_session("a", num_turns=2, num_new=1)], max_context=100)
    player.poll(0)
    for message in (tokens("a/0", 0, 5), tokens("a/0", 0, 5, 6), tokens("a/0", 1, 6), finished("a/0")):
        player.receive(message, 1)
    assert unpack_tokens(player.poll(1)[0].tokens).tolist() == [100, 5, 6, 900, 901, 101]


def test_open_loop_starts_every_session_at_its_arrival_in_order():
    sessions = [make_session("late", 30, 1), make_session("early", 10, 1), make_session("tie", 10, 1)]
    player = SessionPlayer(sessions, max_context=100)
    assert [s.request_id for s in player.poll(30)] == ["early/0", "tie/0", "late/0"]


def test_closed_loop_keeps_the_asked_number_of_sessions_in_progress():
    player = SessionPlayer([make_session(n, num_turns=2) for n in "abc"], max_context=100, concurrency=2)
    assert [s.request_id for s in player.poll(0)] == ["a/0", "b/0"]
    answer(player, "b/0", 5, 1)
    assert [s.request_id for s in player.poll(5)] == ["b/1"]
    answer(player, "b/1", 9, 1)
    (submit,) = player.poll(9)
    assert (submit.request_id, submit.arrival_ns) == ("c/0", 9)


@pytest.mark.parametrize("reason", [FinishReason.ABORTED, FinishReason.REFUSED])
def test_a_failed_turn_ends_its_session_and_frees_its_place(reason):
    player = SessionPlayer([make_session("a"), make_session("b", num_turns=1)], max_context=100, concurrency=1)
    player.poll(0)
    player.receive(finished("a/0", reason), 4)
    assert (player.counts.turns_failed, player.counts.turns_not_sent) == (1, 2)
    assert [s.request_id for s in player.poll(4)] == ["b/0"]
    answer(player, "b/0", 5, 1)
    assert player.done and player.counts.turns_ended == player.counts.num_turns == 4


def test_a_turn_that_could_pass_the_context_ends_its_session_and_is_counted():
    # turn 0: 4 + 2 = 6; turn 1: 4 + 2 + 2 + 4 + 2 = 14; turn 2: 22
    player = SessionPlayer([make_session("a")], max_context=14)
    log = play(player, latency_ns=1)
    assert [request_id for _, request_id, _ in log] == ["a/0", "a/1"]
    assert (player.counts.turns_over_context, player.counts.turns_not_sent) == (1, 1)
    player = SessionPlayer([make_session("a")], max_context=13)
    play(player, latency_ns=1)
    assert (player.counts.turns_over_context, player.counts.turns_not_sent) == (1, 2)


def test_many_first_turns_over_the_context_take_no_place_in_a_closed_loop():
    too_long = [make_session(f"long-{k}", num_new=50) for k in range(5000)]
    player = SessionPlayer([make_session("a", num_turns=1), *too_long], max_context=20, concurrency=1)
    play(player, latency_ns=1)
    assert player.counts.turns_over_context == 5000
    assert player.counts.turns_not_sent == 15000
    assert player.counts.turns_ended == player.counts.num_turns


def test_two_players_are_independent_and_play_the_same():
    sessions = [make_session(f"s{k}", arrival_ns=k % 3, think_time_ns=k) for k in range(8)]
    first, second = SessionPlayer(sessions, 1000), SessionPlayer(sessions, 1000)
    first.poll(10)
    first.receive(finished("s0/0", FinishReason.ABORTED), 11)
    fresh = SessionPlayer(sessions, 1000)
    assert play(second, latency_ns=5) == play(fresh, latency_ns=5)
    assert second.counts.turns_answered == 24


def test_bad_players_are_refused():
    with pytest.raises(ValueError, match="session_id='a' is used by more than one"):
        SessionPlayer([make_session("a"), make_session("a")], 100)
    with pytest.raises(ValueError, match="max_context=0"):
        SessionPlayer([], 0)
    with pytest.raises(ValueError, match="concurrency=0"):
        SessionPlayer([], 10, concurrency=0)
    assert SessionPlayer([], 10).done


def test_sessions_of_one_chat_are_one_to_the_cluster_and_do_not_wait_for_each_other():
    chat = [
        dataclasses.replace(make_session(name, arrival, num_turns=1), chat="c")
        for name, arrival in (("a", 0), ("b", 3))
    ]
    player = SessionPlayer([*chat, make_session("d")], max_context=100)
    assert [(s.request_id, s.session_id) for s in player.poll(3)] == [("a/0", "c"), ("d/0", "d"), ("b/0", "c")]
