"""InstanceLoop on a mailbox played by hand: nothing that comes early, or together, is lost."""

import msgspec
import numpy as np
import pytest

from memserve import load_config
from memserve.cluster.build import build_instance
from memserve.cluster.engine import build_engine
from memserve.cluster.node import InstanceLoop
from memserve.cluster.node_messages import (
    Between,
    Gone,
    Leave,
    Left,
    LeftEarly,
    Ping,
    Pong,
    Ready,
    Retire,
    Start,
    Stop,
    Stopped,
)
from memserve.cluster.roster import Roster
from memserve.kvcache.head_parts import endpoint_of
from memserve.messages import Dispatch, Fetch, Finished, Refuse, Tokens, pack_tokens
from memserve.request import Role
from memserve.sampling_params import SamplingParams
from memserve.transfer import InProcess, LinkModel

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
DISPATCH = Dispatch("r", 0, "s", pack_tokens(np.arange(20, dtype=np.int32)), PARAMS, 0)
FETCH = Fetch((1, -1), pack_tokens(np.arange(16, dtype=np.int32)), 16, 0)


class PlayedMailbox:
    """Answers each kind of message with a list of others, which arrive together. Rank 0 is the only peer."""

    def __init__(self, **answers):
        self.sent, self._answers, self._here, self._num_waits = [], answers, [], 0

    def send(self, rank, message):
        self.sent.append(message)
        answer = self._answers.get(type(message).__name__, [])
        self._here += answer(message) if callable(answer) else answer

    def receive(self, timeout_ms):
        here, self._here = self._here, []
        self._num_waits += bool(timeout_ms and not here)
        assert self._num_waits < 100, "the instance waits for what never comes"
        return [(0, message) for message in here]

    def beat(self, rank, message, interval_s):
        pass


def play(cfg=None, transport=None, kind=PlayedMailbox, **answers):
    """What the instance sends when it is answered so."""
    cfg = cfg or load_config(["exec=simulated"])
    instance = build_instance(cfg, build_engine(cfg), "colocated-0", Role.COLOCATED, 0, transport=transport)
    defaults = {"Ping": lambda ping: [Pong(ping.sent_ns, 0)], "Finished": [Stop(10**12)], "Stopped": [Leave()]}
    mailbox = kind(**(defaults | answers))
    InstanceLoop(0, instance, mailbox, Roster([1, 1]), transport, stop_s=1.0, num_threads=1).run([])
    return mailbox.sent


@pytest.mark.parametrize("came", [[Start(0), DISPATCH], [Gone(3), Start(0), DISPATCH]], ids=["after", "around"])
def test_what_comes_together_with_the_start_is_served(came):
    sent = play(Ready=came)
    assert [type(message) for message in sent if isinstance(message, Ping | Ready)] == [*[Ping] * 5, Ready]
    (finished,) = [message for message in sent if isinstance(message, Finished)]
    assert finished.request_id == "r" and finished.reason == "length"
    assert isinstance(sent[-1], Stopped)


class Prepared(InProcess):
    """Notes in the mail what it prepares for."""

    def __init__(self):
        super().__init__(LinkModel(0.0, 1.0))
        self.order = []

    def prepare(self, endpoints, limit_s):
        self.order.append(list(endpoints))


def test_the_first_moves_are_prepared_before_an_instance_is_ready():
    transport = Prepared()

    def ready(message):
        transport.order.append("ready")
        return [Start(0), DISPATCH]

    play(transport=transport, Ready=ready)
    assert transport.order == [[endpoint_of(1, 0)], "ready"]


class InStep(PlayedMailbox):
    """Another instance asks for what nobody has, and a client for an answer, as soon as the first step has begun."""

    def receive(self, timeout_ms):
        received = super().receive(timeout_ms)
        if (0, DISPATCH) in received:
            self._here += [Between(1, 0, FETCH), msgspec.structs.replace(DISPATCH, request_id="later")]
        return received


def test_a_peer_is_answered_between_two_layers_and_what_else_comes_then_is_kept_for_the_next_step():
    cfg = load_config(["exec=simulated", "cluster=colocated_2", "fetch=always"])
    transport = InProcess(LinkModel(latency_s=0, gb_per_s=1))
    stop_after = {"Finished": lambda told: [Stop(10**12)] if told.request_id == "later" else []}
    sent = play(cfg, transport, InStep, Ready=[Start(0), DISPATCH], **stop_after)
    kinds = [type(message.message if isinstance(message, Between) else message) for message in sent]
    assert kinds.index(Refuse) < kinds.index(Tokens)
    assert [message.request_id for message in sent if isinstance(message, Finished)] == ["r", "later"]


def test_an_instance_that_is_sent_home_before_the_start_says_so():
    with pytest.raises(LeftEarly, match="rank 0 ended before the run began"):
        play(Ready=[Leave()])


def test_an_instance_that_is_to_leave_when_the_run_ends_stops_with_it():
    sent = play(Ready=[Start(0), Retire(), Stop(10**12)])
    assert isinstance(sent[-1], Stopped) and not any(isinstance(message, Left) for message in sent)
    sent = play(Ready=[Start(0), Retire()])
    assert isinstance(sent[-1], Left)
