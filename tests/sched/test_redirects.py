"""What the global scheduler says to whom while answers migrate, whatever it hears first."""

import numpy as np
import pytest
from mini_cluster import group_of

from memserve.messages import (
    Abort,
    Cancel,
    Dispatch,
    Finished,
    HandoffEnded,
    Redirect,
    Submit,
    Tokens,
    pack_times,
    pack_tokens,
)
from memserve.request import FinishReason
from memserve.sampling_params import SamplingParams
from memserve.sched.departures import EndThere, Migrate
from memserve.sched.global_scheduler import GlobalScheduler
from memserve.sched.modes import PDBasic
from memserve.sched.routing import RoundRobin

NUM_TOKENS = 12  # of the KV that migrates


class Told:
    """A global scheduler over colocated instances, and what it says. The request `r` decodes at a, which drains."""

    def __init__(self, labels="abc", departure=None):
        group = group_of(list(labels), RoundRobin())
        self.scheduler = GlobalScheduler(group, np.random.default_rng(0), departure=departure or Migrate())
        self.hear(Submit("r", "", pack_tokens(np.arange(10)), SamplingParams(max_tokens=9), 0))
        self.tokens(0, 3)
        self.scheduler.instance_draining("a", 0)

    def hear(self, message):
        self.scheduler.receive(message, 0)

    def tokens(self, index, num, attempt=0):
        times = pack_times(np.arange(num))
        self.hear(Tokens("r", attempt, index, pack_tokens(np.arange(index, index + num)), times))

    def ended(self, *, done=False, refused=False, instance="a"):
        self.hear(HandoffEnded("r", 0, instance, done, refused, "", NUM_TOKENS))

    def said(self):
        return [(to, message) for to, message in self.scheduler.drain_outbox() if to != "client"][1:]

    def later(self):
        return [(to, message) for to, message in self.scheduler.drain_outbox() if to != "client"]

    @property
    def loads(self):
        (group,) = self.scheduler.groups.all
        return {label: group.num_requests(label) for label in group.labels if group.num_requests(label)}

    @property
    def timeline(self):
        return self.scheduler.timelines["r"]


@pytest.fixture
def told():
    return Told()


def target_of(said):
    ((to, redirect),) = said
    assert to == "a" and isinstance(redirect, Redirect) and redirect.decode in (1, 2)
    return "abc"[redirect.decode]


def test_an_answer_counts_at_both_places_until_it_has_moved(told):
    target = target_of(told.said())
    assert told.loads == {"a": 1, target: 1}
    assert told.scheduler.is_needed("a") and told.scheduler.is_needed(target)
    told.ended(done=True)
    assert told.loads == {target: 1} and not told.scheduler.is_needed("a") and told.scheduler.is_needed(target)
    told.tokens(3, 1)
    assert told.later() == [] and told.timeline.num_output == 4


def test_a_decode_instance_has_the_work_of_an_answer_that_migrates_to_it_until_its_end():
    decode = group_of(["d-0", "d-1"], RoundRobin())
    scheduler = GlobalScheduler(
        group_of(["p"], RoundRobin()), np.random.default_rng(0), decode=decode, mode=PDBasic(), departure=Migrate()
    )

    def work():
        rows = np.arange(2)
        return decode.snapshot(rows, np.zeros_like(rows), "", 0).queued_work.tolist()

    scheduler.receive(Submit("r", "", pack_tokens(np.arange(10)), SamplingParams(max_tokens=9), 0), 0)
    for index in range(2):
        tokens, times = pack_tokens(np.array([index])), pack_times(np.array([index]))
        scheduler.receive(Tokens("r", 0, index, tokens, times), 0)
    assert work() == [10, 0]
    scheduler.instance_draining("d-0", 0)
    assert work() == [10, 10]
    scheduler.receive(HandoffEnded("r", 0, "d-0", done=True, num_tokens=NUM_TOKENS), 0)
    assert work() == [0, 10]
    scheduler.receive(Finished("r", 0, FinishReason.LENGTH, "", None), 0)
    assert work() == [0, 0]


def test_with_departure_wait_nothing_is_said():
    told = Told(departure=EndThere())
    assert told.said() == [] and told.scheduler.is_needed("a")


def test_the_next_one_is_asked_and_with_none_left_it_goes_on_where_it_is(told):
    first = target_of(told.said())
    told.ended(refused=True)
    second = target_of(told.later())
    assert {first, second} == {"b", "c"} and told.loads == {"a": 1, second: 1}
    told.ended(refused=True)
    assert told.later() == [("a", Redirect("r", 0, 0))] and told.loads == {"a": 1}
    told.tokens(3, 1)
    assert told.later() == [], "nobody is asked before there may be room"
    told.hear(Submit("other", "", pack_tokens(np.arange(4)), SamplingParams(max_tokens=9), 0))
    ((to, _),) = told.later()
    told.hear(Finished("other", 0, FinishReason.LENGTH, "", None))
    assert to in "bc" and target_of(told.later()) in "bc"
    assert [(m.done, m.num_tokens) for m in told.timeline.migrations] == [(False, NUM_TOKENS)] * 2


def test_who_comes_may_have_room():
    told = Told(labels="ab")
    told.said()
    told.ended(refused=True)
    told.later()
    told.scheduler.instance_joined("c", 2, "colocated", 0)
    assert told.later()[0][1].decode in (1, 2)


def test_a_copy_that_may_be_elsewhere_is_dropped_and_its_end_is_not_the_request_s(told):
    target = target_of(told.said())
    told.ended()
    dropped, (to, redirect) = told.later()
    assert dropped == (target, Abort("r", 0)) and to == "a" and "abc"[redirect.decode] != target
    told.hear(Finished("r", 0, FinishReason.ABORTED, "cancelled by the client", None))
    assert told.scheduler.num_unfinished == 1
    told.hear(Cancel("r"))
    told.hear(Finished("r", 0, FinishReason.ABORTED, "cancelled by the client", None))
    assert told.scheduler.num_unfinished == 0 and told.loads == {}


def test_a_late_token_of_a_copy_holds_up_nobody(told):
    told.said()
    told.ended()
    told.tokens(3, 3)
    told.tokens(3, 1)  # of a step of the copy's that was under way when it was told to drop it
    told.tokens(6, 3)
    told.hear(Finished("r", 0, FinishReason.LENGTH, "", None))
    assert told.timeline.num_output == 9 and told.timeline.token_ids.tolist() == list(range(9))
    assert told.scheduler.num_unfinished == 0


def test_what_came_to_an_instance_that_is_gone_since_is_served_again(told):
    target = target_of(told.said())
    told.scheduler.instance_gone(target, 0)
    assert told.later() == [], "its KV may still be where it was"
    told.ended(done=True)
    said = told.later()
    assert {to for to, message in said if isinstance(message, Abort)} == {"a", target}
    ((_, dispatch),) = [(to, message) for to, message in said if isinstance(message, Dispatch)]
    assert dispatch.attempt == 1 and sum(told.loads.values()) == 1


def test_what_had_not_come_to_an_instance_that_is_gone_goes_to_another(told):
    target = target_of(told.said())
    told.scheduler.instance_gone(target, 0)
    told.ended()
    assert next(message for _, message in told.later() if isinstance(message, Redirect)).decode != "abc".index(target)


def test_an_answer_is_lost_with_its_instance_and_its_copy_with_it(told):
    target = target_of(told.said())
    told.scheduler.instance_gone("a", 0)
    said = told.later()
    assert {to for to, message in said if isinstance(message, Abort)} == {"a", target}
    assert [message.attempt for _, message in said if isinstance(message, Dispatch)] == [1]
    told.ended(done=True)
    assert told.later() == [], "of an attempt that was given up"


def test_a_target_that_is_to_leave_hands_it_on(told):
    target = target_of(told.said())
    told.scheduler.instance_draining(target, 0)
    told.ended(done=True)
    ((to, redirect),) = told.later()
    assert to == target and redirect.decode != "abc".index(target)


def test_an_answer_that_ended_at_its_target_is_over_whatever_comes_then(told):
    told.said()
    told.hear(Finished("r", 0, FinishReason.LENGTH, "", None))
    assert told.loads == {} and told.scheduler.num_unfinished == 0
    told.ended(done=True)
    assert told.later() == []
