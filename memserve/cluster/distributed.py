"""DistributedCluster: a configuration's cluster as processes under torchrun; the same instances, modes and messages.

    torchrun --nproc-per-node 3 scripts/run.py exec=distributed cluster=1p1d mode=pd_caching_3 transport=mapped

Rank 0 plays the client and routes (controller.py); the others are instances, of one rank each or of several
(member.py, roster.py). Time is the machine's. Where each member was started by itself (`cluster.store=`), the store is
rank 0's: it stays until the others have left, and they end when it is gone.
"""

import signal
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

from memserve.cluster.build import build_roles
from memserve.cluster.controller import Controller
from memserve.cluster.engine import build_engine
from memserve.cluster.farewell import Farewell
from memserve.cluster.hosts import check_one_host, hosts_of, neighbours
from memserve.cluster.interruption import Interrupted, ended_at_once, heed_signals, leave
from memserve.cluster.launch import Place
from memserve.cluster.mailbox import Mailbox
from memserve.cluster.make import make
from memserve.cluster.member import Member
from memserve.cluster.node_messages import Broken, LeftAlone, LeftEarly
from memserve.cluster.result import Result, finish_runs
from memserve.cluster.roster import CONTROLLER, Roster
from memserve.cluster.torchrun import Torchrun
from memserve.cluster.turnover import InstanceFailed
from memserve.config.runs import num_runs, of_run
from memserve.config.schema import RunConfig
from memserve.config.targets import node_class
from memserve.metrics.progress import Progress
from memserve.metrics.report import Report
from memserve.model.parallel import GroupBroken
from memserve.transfer.shared_memory import host_id
from memserve.workload.session import Workload, sessions_of


class DistributedCluster:
    """This process's part of the cluster. Raises ConfigError or ValueError for what cannot be run as configured.

    torchrun: what started it, and is to end it with itself.  Collective: every rank makes the same calls.
    """

    def __init__(self, cfg: RunConfig, place: Place, torchrun: Torchrun) -> None:
        self.cfg, self._place, self._torchrun = cfg, place, torchrun
        self._roles = build_roles(cfg)
        self._neighbours = self._meet()
        self._mailbox = Mailbox(place.rank, place.store, place.host, place.birth)

    def _meet(self) -> list[int]:
        """The ranks on this rank's host, it among them; none for rank 0."""
        place = self._place
        if place.rank == CONTROLLER and not node_class(self.cfg.transport).within_host:
            return []  # it need not wait for them
        with ended_at_once():
            hosts = hosts_of(place.store, place.rank, place.world_size, host_id())
        if node_class(self.cfg.transport).within_host:
            check_one_host(hosts)
        return [] if place.rank == CONTROLLER else neighbours(hosts, place.rank)

    def run(self, output_dir: str | Path | None = None, *, progress: Progress | None = None) -> Report | None:
        """Plays the workload, `repeats` times or with `seeds` seeds. Rank 0 returns the report and writes `output_dir`;
        others return None.

        Raises InstanceFailed on rank 0 when an instance ends by an error, or, with all written, when one that gives no
        sign of life may be there for ever: torchrun then ends it. Raises LeftEarly on the others when rank 0 does,
        GroupBroken on the others of an instance that has lost a rank, and Interrupted after SIGINT or SIGTERM.
        """
        self._heed_signals()
        try:
            results = self.play(progress)
            report = finish_runs(self.cfg, results, output_dir) if results else None
            check_ended(results, output_dir)
            return report
        except InstanceFailed:
            if self._torchrun.is_gone:  # the others have noticed first
                leave(signal.SIGTERM)
            raise

    def play(self, progress: Progress | None = None) -> list[Result]:
        """The runs, each from empty pools: their results on rank 0, none on the others. Once in a cluster's life."""
        with closing(self._mailbox):  # what was sent last goes out
            farewell = Farewell.of(self.cfg, self._place, self._mailbox)
            try:
                if self._place.rank == CONTROLLER:
                    return self._control(progress)
                self._serve()
                return []
            finally:
                with suppress(Interrupted):  # what was played is there
                    farewell.say()

    def _control(self, progress: Progress | None) -> list[Result]:
        """Rank 0's part of `play`."""
        workload: Workload = make(self.cfg.workload)
        engine = build_engine(self.cfg, with_model=False)
        results: list[Result] = []
        for number in range(num_runs(self.cfg)):
            cfg = of_run(self.cfg, number)
            if number == 0 or cfg.seed != self.cfg.seed:
                sessions = sessions_of(workload, engine.tokenizer, cfg.seed)
            missing = dict(results[-1].missing) if results else {}
            if self.cfg.cluster.store is not None:  # those that are gone come again
                missing = {label: why for label, why in missing.items() if why == "silent"}
            if missing:
                raise InstanceFailed(f"run {number + 1} of {num_runs(self.cfg)}: {_listed(missing)}")
            controller = Controller(
                cfg,
                self._roles,
                Roster.of(self.cfg),
                self._mailbox,
                engine,
                sessions,
                workload,
                number,
            )
            results.append(controller.run(progress))
        return results

    def _heed_signals(self) -> None:
        """A clean end on SIGINT and SIGTERM, which comes when torchrun is killed, too. A follower waits for its leader
        below Python, where no handler runs: it has nothing to clean up, and is just ended.
        """
        roster, rank = Roster.of(self.cfg), self._place.rank
        follows = rank != CONTROLLER and roster.part(rank) > 0
        heed_signals(has_nothing=follows)

    def _serve(self) -> None:
        """An instance's rank; rank 0 learns why it ends."""
        try:
            Member(self.cfg, self._place, self._mailbox, self._neighbours).serve()
        except LeftEarly:
            raise  # rank 0 knows
        except GroupBroken as error:
            self._mailbox.send(CONTROLLER, LeftAlone(str(error)))
            raise
        except Exception as error:
            self._mailbox.send(CONTROLLER, Broken(f"{type(error).__name__}: {error}"))
            raise


def check_ended(results: Sequence[Result], output_dir: str | Path | None) -> None:
    """Raises InstanceFailed where an instance may still be there after the last run."""
    silent = {label: why for label, why in results[-1].missing.items() if why == "silent"} if results else {}
    if silent:
        raise InstanceFailed(f"{_listed(silent)} at the end of the run, whose results are in {output_dir}")


def _listed(missing: Mapping[str, str]) -> str:
    return ", ".join(f"{label} is {why}" for label, why in missing.items())
