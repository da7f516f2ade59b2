"""Member: the life of one rank other than rank 0, as an instance's leader or follower, over all runs of a cluster.

    join the tensor-parallel group, load this rank's part of the model
    leader      warm up; each run: build the instance, meet the followers, InstanceLoop until rank 0 says Leave
    follower    follow the warm-up; each run: attach its own memory, meet the leader, follow until it says stop

An instance of one rank is a leader without followers. A rank whose instance has left waits to become another one, as a
spare rank does from the start (spare.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import msgspec
import torch
from torch.distributed.distributed_c10d import PrefixStore

from memserve.cluster.build import Engine, RankPart, build_engine, build_instance, build_part, build_roles
from memserve.cluster.launch import Place, choose_device, joined, set_threads
from memserve.cluster.mailbox import AnyMessage, Mailbox
from memserve.cluster.node import InstanceLoop
from memserve.cluster.node_messages import BEAT_S, Alive, Become, LeftEarly, Process, this_process
from memserve.cluster.parallel_transport import ParallelTransport, TransferHand
from memserve.cluster.roster import CONTROLLER, Roster
from memserve.cluster.spare import Spare
from memserve.cluster.warm_up import warm_up
from memserve.cluster.wiring import build_process_transport, follows_events
from memserve.cluster.worker import Followers, Hand, IdleHand, follow, meet
from memserve.config.schema import RunConfig
from memserve.kvcache.head_parts import endpoint_of
from memserve.model.parallel import LEADER, GroupBroken, Shard
from memserve.model.runner import ModelRunner
from memserve.request import Role
from memserve.transfer.transport import Transport


class Member:
    """mailbox: this rank's in the cluster."""

    def __init__(self, cfg: RunConfig, place: Place, mailbox: Mailbox) -> None:
        self._cfg, self._place, self._mailbox = cfg, place, mailbox
        roster = Roster.of(cfg)
        self._instance, self._part = roster.instance(place.rank), roster.part(place.rank)  # at the start of a run
        self._size = 1 if self._instance is None else roster.size(self._instance)

    def serve(self) -> None:
        """All runs. Raises LeftEarly when rank 0 ends before they do, GroupBroken when another rank has gone."""
        num_threads = set_threads(self._cfg, self._place)
        choose_device(self._place)
        with joined(self._place, Roster.of(self._cfg), torch.device(self._cfg.model.device)) as shard:
            engine = build_engine(self._cfg, shard=shard)
            for number in range(self._cfg.repeats):
                if self._part == LEADER:
                    self._lead(number, engine, shard, num_threads)
                else:
                    self._follow(number, engine, shard)

    def _lead(self, number: int, engine: Engine, shard: Shard, num_threads: int) -> None:
        """A run: what this rank is at its start, and what it becomes when that has left."""
        if number == 0:
            label, role = build_roles(self._cfg)[self._instance or 0]
            with self._followers(shard, engine) as followers:
                warm_up(build_instance(self._cfg, engine, label, role, 0, followers=followers, in_real_time=True))
        spare, roster = Spare(self._mailbox, number), Roster.of(self._cfg)
        assigned = self._first_assignment()
        while assigned is not None or (assigned := spare.wait()) is not None:
            for instance, rank in assigned.leaders:
                roster.assign(instance, rank)
            if not self._be(assigned, roster, number, engine, shard, num_threads, spare.early):
                return
            assigned, spare.early = None, []

    def _first_assignment(self) -> Become | None:
        """What this rank is when a run begins; None for a spare one."""
        if self._instance is None:
            return None
        label, role = build_roles(self._cfg)[self._instance]
        return Become(self._instance, label, role, [])

    def _be(
        self,
        assigned: Become,
        roster: Roster,
        number: int,
        engine: Engine,
        shard: Shard,
        num_threads: int,
        early: Sequence[tuple[int, AnyMessage]],
    ) -> bool:
        """Leads an instance, until it has left (True) or the run is over."""
        role = Role(assigned.role)
        build = partial(build_instance, self._cfg, engine, assigned.label, role, assigned.instance, in_real_time=True)
        with self._followers(shard, engine) as followers, self._transport(number, followers) as transport:
            instance = build(transport=transport, followers=followers)
            if follows_events(self._cfg):
                instance.pool.follow()
            processes = [this_process()]
            if followers is not None:
                followers.meet()  # their memory is attached
                processes += self._others(number)
            stop_s = self._cfg.transfer.deadline_s
            loop = InstanceLoop(
                assigned.instance, instance, self._mailbox, roster, transport,
                stop_s=stop_s, num_threads=num_threads, early=early,
            )  # fmt: skip
            return loop.run(processes)

    def _follow(self, number: int, engine: Engine, shard: Shard) -> None:
        if number == 0:
            _until_stopped(build_part(self._cfg, engine), IdleHand())
        part = build_part(self._cfg, engine)
        self._team_store(number).set(f"process/{self._part}", msgspec.json.encode(this_process()).decode())
        with self._hand(number, part) as hand:
            meet(shard, _device(engine))
            self._mailbox.beat(CONTROLLER, Alive(), BEAT_S)
            _until_stopped(part, hand)

    def _team_store(self, number: int) -> PrefixStore:
        """What the ranks of this instance tell each other in a run."""
        return PrefixStore(f"instance/{self._instance}/{number}", self._place.store)

    def _others(self, number: int) -> list[Process]:
        """The followers' processes, once they have met their leader."""
        store = self._team_store(number)
        keys = [f"process/{part}" for part in range(1, self._size)]
        return [msgspec.json.decode(store.get(key), type=Process) for key in keys]

    def _own_transport(self, number: int) -> Transport | None:
        return build_process_transport(self._cfg, PrefixStore(f"run/{number}", self._place.store), self._place.host)

    @contextmanager
    def _followers(self, shard: Shard, engine: Engine) -> Iterator[Followers | None]:
        """The other ranks, until they are stopped; None where there are none."""
        if self._size == 1:
            yield None
            return
        followers, reason = Followers(shard, _device(engine)), "the leader failed"
        try:
            yield followers
            reason = ""
        except LeftEarly as error:
            reason = str(error)
            raise
        finally:
            with suppress(GroupBroken):  # then they know
                followers.stop(reason)

    @contextmanager
    def _transport(self, number: int, followers: Followers | None) -> Iterator[Transport | None]:
        """A leader's, over all ranks of its instance; None where nothing is handed over."""
        transport = self._own_transport(number)
        if transport is None:
            yield None
            return
        team = None
        if followers is not None:
            team = Mailbox(LEADER, self._team_store(number), self._place.host)
            transport = ParallelTransport(transport, team, followers)
        try:
            yield transport
        finally:
            transport.close()
            if team is not None:
                team.close()

    @contextmanager
    def _hand(self, number: int, part: RankPart) -> Iterator[Hand]:
        """A follower's part in its instance's transfers."""
        transport = self._own_transport(number)
        if transport is None:
            yield IdleHand()
            return
        assert self._instance is not None, "a follower has a leader"
        endpoint = endpoint_of(self._instance, self._part)
        transport.attach(endpoint, part.memories)
        team = Mailbox(self._part, self._team_store(number), self._place.host)
        hand = TransferHand(transport, endpoint, team)
        hand.start()
        try:
            yield hand
        finally:
            hand.close()
            team.close()


def _until_stopped(part: RankPart, hand: Hand) -> None:
    assert isinstance(part.runner, ModelRunner), "what is split is a model"
    reason = follow(part.runner, part.copier, hand)
    if reason:
        raise LeftEarly(reason)


def _device(engine: Engine) -> torch.device:
    assert engine.model is not None, "what is split is a model"
    return engine.model.device
