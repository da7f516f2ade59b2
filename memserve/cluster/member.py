"""Member: the life of one rank other than rank 0, as an instance's leader or follower, over all runs of a cluster.

    join the tensor-parallel group, load this rank's part of the model
    leader      warm up; each run: build the instance, meet the followers, InstanceLoop until rank 0 says Leave
    follower    follow the warm-up; each run: attach its own memory, meet the leader, follow until it says stop

An instance of one rank is a leader without followers. A rank whose instance has left waits to become another one, as a
spare rank does from the start (spare.py), and as a process does that is there in the place of one that is gone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import msgspec
import torch
from torch.distributed.distributed_c10d import PrefixStore

from memserve.cluster.build import RankPart, build_instance, build_part, build_roles
from memserve.cluster.engine import Engine, build_engine
from memserve.cluster.hosts import choose_device, set_threads
from memserve.cluster.launch import Place, joined
from memserve.cluster.mailbox import AnyMessage, Mailbox
from memserve.cluster.node import InstanceLoop
from memserve.cluster.node_messages import BEAT_S, Alive, Become, LeftEarly, Process, this_process
from memserve.cluster.parallel_transport import ParallelTransport, TransferHand
from memserve.cluster.roster import CONTROLLER, Roster
from memserve.cluster.spare import Spare, resumed_run
from memserve.cluster.warm_up import warm_up
from memserve.cluster.wiring import build_process_transport, follows_events
from memserve.cluster.worker import Followers, Hand, IdleHand, follow, meet
from memserve.config.runs import num_runs, of_run
from memserve.config.schema import RunConfig
from memserve.kvcache.head_parts import endpoint_of
from memserve.model.parallel import LEADER, GroupBroken, Shard
from memserve.model.runner import ModelRunner
from memserve.request import SERVING, Role
from memserve.transfer.transport import Transport
from memserve.transfer.wire import NO_LIMIT


class Member:
    """mailbox: this rank's in the cluster.  neighbours: the ranks on this host, it among them."""

    def __init__(self, cfg: RunConfig, place: Place, mailbox: Mailbox, neighbours: Sequence[int]) -> None:
        self._cfg, self._place, self._mailbox, self._neighbours = cfg, place, mailbox, neighbours
        roster = Roster.of(cfg)
        self._instance, self._part = roster.instance(place.rank), roster.part(place.rank)  # at the start of a run
        self._size = 1 if self._instance is None else roster.size(self._instance)
        self._team = place.team_store(self._instance)
        self._role = self._first_role()

    def _first_role(self) -> Role:
        """What this rank is at the start, or what a spare one can be."""
        roles = [role for _, role in build_roles(self._cfg)]
        return next(role for role in roles if role in SERVING) if self._instance is None else roles[self._instance]

    def serve(self) -> None:
        """All runs. Raises LeftEarly when rank 0 ends before they do, GroupBroken when another rank has gone."""
        num_threads = set_threads(self._cfg, self._neighbours)
        choose_device(self._cfg.model.device, self._neighbours, self._place.rank)
        with joined(self._team, self._size, self._part, torch.device(self._cfg.model.device)) as shard:
            engine = build_engine(self._cfg, shard=shard, with_weights=self._role in SERVING)
            if self._part == LEADER:
                self._lead_all(engine, shard, num_threads)
            else:
                self._follow_all(engine, shard)

    def _lead_all(self, engine: Engine, shard: Shard, num_threads: int) -> None:
        with self._followers(shard, engine) as followers:
            if self._role in SERVING:
                build = partial(build_instance, self._cfg, engine, "warm-up", self._role, 0, in_real_time=True)
                warm_up(build(followers=followers))
        is_reborn = self._place.birth > 0
        first = resumed_run(self._mailbox) if is_reborn else 0
        runs = range(0) if first is None else range(first, num_runs(self._cfg))
        self._tell_team("runs", [*runs])
        for number in runs:
            assigned = None if is_reborn and number == first else self._first_assignment()
            self._lead(number, assigned, engine, shard, num_threads)

    def _follow_all(self, engine: Engine, shard: Shard) -> None:
        _until_stopped(self._build_part(engine), IdleHand())
        for number in self._hear_from_leader("runs"):
            for instance in self._hear_from_leader(f"instance/{number}"):
                self._follow(number, instance, engine, shard)

    def _lead(self, number: int, assigned: Become | None, engine: Engine, shard: Shard, num_threads: int) -> None:
        """A run. assigned: what this rank is at its start; it may become something else when that has left."""
        spare, roster = Spare(self._mailbox, number), Roster.of(self._cfg)
        self._mailbox.reconnect_all()  # who has come since in the place of another was not told to all
        try:
            assigned = assigned or spare.wait()
        finally:
            self._tell_team(f"instance/{number}", [] if assigned is None else [assigned.instance])
        while assigned is not None:
            for instance, rank in assigned.leaders:
                roster.assign(instance, rank)
                self._mailbox.reconnect(rank)
            if not self._be(assigned, roster, number, engine, shard, num_threads, spare.early):
                return
            spare.early = []
            assigned = spare.wait()

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
        role, cfg = Role(assigned.role), of_run(self._cfg, number)
        build = partial(build_instance, cfg, engine, assigned.label, role, assigned.instance, in_real_time=True)
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

    def _follow(self, number: int, instance: int, engine: Engine, shard: Shard) -> None:
        """A run, in which this rank is a part of that instance."""
        self._mailbox.beat(CONTROLLER, Alive(), BEAT_S)
        part = self._build_part(engine)
        self._team_store(number).set(f"process/{self._part}", msgspec.json.encode(this_process()).decode())
        with self._hand(number, instance, part) as hand:
            meet(shard, _device(engine))
            _until_stopped(part, hand)

    def _build_part(self, engine: Engine) -> RankPart:
        """A follower's: its instance is what it is from the start."""
        return build_part(self._cfg, engine, self._role)

    def _team_store(self, number: int) -> PrefixStore:
        """What the ranks of this instance tell each other in a run."""
        return PrefixStore(f"run/{number}", self._team)

    def _tell_team(self, key: str, numbers: Sequence[int]) -> None:
        """Lets the followers know, if there are any."""
        if self._size > 1:
            self._team.set(key, msgspec.json.encode(list(numbers)).decode())

    def _hear_from_leader(self, key: str) -> list[int]:
        """Waits for it as long as it takes: whoever ends the leader ends this rank too."""
        self._team.wait([key], NO_LIMIT)
        return msgspec.json.decode(self._team.get(key), type=list[int])

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
    def _hand(self, number: int, instance: int, part: RankPart) -> Iterator[Hand]:
        """A follower's part in its instance's transfers."""
        transport = self._own_transport(number)
        if transport is None:
            yield IdleHand()
            return
        endpoint = endpoint_of(instance, self._part)
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
