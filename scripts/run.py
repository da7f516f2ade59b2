"""One experiment: a cluster on a workload, and an output directory that says what was run and what came out.

python scripts/run.py                                            # the default: one instance, the chat workload
python scripts/run.py index=none workload.rate=2                 # one word an ablation
python scripts/run.py exec=simulated cluster=colocated_4 policy=least_load
python scripts/run.py -m index=none,radix workload.rate=1,2,4    # a sweep: a process a point; hydra.sweep.dir= to go on
torchrun --nproc-per-node 3 scripts/run.py exec=distributed cluster=1p1d mode=pd_caching_3 transport=mapped
torchrun --nproc-per-node 4 scripts/run.py exec=distributed model=tiny cluster=1p1d mode=pd_basic transport=gloo \
    cluster.tensor_parallel.decode=2                             # a decode instance of two ranks

Each member of a cluster can be started by itself; one that fails is then started again, and rejoins:

python scripts/run.py $WORDS cluster.store=$STORE cluster.member=scheduler
torchrun --standalone --nproc-per-node 1 --max-restarts 3 scripts/run.py $WORDS cluster.store=$STORE cluster.member=0
torchrun --standalone --nproc-per-node 1 --max-restarts 3 scripts/run.py $WORDS cluster.store=$STORE cluster.member=1
"""

import gc

gc.disable()  # what is imported is no garbage; to look for some in it is a quarter of the time that a process starts in

import os

from memserve.cluster.torchrun import own_torchrun

TORCHRUN = own_torchrun(os.environ)
TORCHRUN.end_with()  # also before it is a part of the cluster: a torchrun that is killed ends nobody

import atexit
import logging
import signal
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from torch.distributed import DistError

from memserve.cluster.build import check_wired
from memserve.cluster.distributed import DistributedCluster
from memserve.cluster.interruption import Interrupted
from memserve.cluster.launch import RunOver, check_words, find_place, is_first, is_under_torchrun
from memserve.cluster.local import LocalCluster
from memserve.cluster.node import LeftEarly
from memserve.cluster.result import NotWritten
from memserve.cluster.roster import CONTROLLER
from memserve.cluster.sweep import run_point
from memserve.cluster.turnover import InstanceFailed
from memserve.compose import config_dir, load_config, resolve
from memserve.config.blame import told
from memserve.config.overrides import of_configuration, with_search
from memserve.config.schema import RunConfig
from memserve.metrics.progress import Progress
from memserve.metrics.report import Report
from memserve.metrics.table import print_report
from memserve.model.parallel import GroupBroken
from memserve.model.sampler import InvalidLogits

gc.freeze()
gc.enable()
atexit.register(gc.unfreeze)  # what is imported ends with the process: Triton 3.9 says of each piece that does not


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="run")
def main(composed: DictConfig) -> int:
    """The run, or a point of a sweep. Returns its exit status, which the sweep's table asks for."""
    hydra_cfg = HydraConfig.get()
    output_dir = Path(hydra_cfg.runtime.output_dir)
    if hydra_cfg.mode is RunMode.MULTIRUN:
        if hydra_cfg.sweep.subdir != ".":
            sys.exit(f"error: hydra.sweep.subdir={hydra_cfg.sweep.subdir}: expected ., a point is named by its words")
        search = of_configuration(hydra_cfg.overrides.hydra)
        return run_point(composed, Path(__file__), list(hydra_cfg.overrides.task), output_dir, search)
    title = " ".join(hydra_cfg.overrides.task) or "defaults"
    try:
        cfg = resolve(composed)
        report = control(cfg, output_dir) if cfg.exec == "distributed" else play(cfg, output_dir)
    except NotWritten as error:
        print_report(error.report, title=title)
        sys.exit(f"error: {error}")
    except (ValueError, MemoryError, OSError, InstanceFailed, InvalidLogits) as error:
        sys.exit(told(error))
    except Interrupted as interrupted:
        print(f"error: {interrupted}", file=sys.stderr, flush=True)
        sys.exit(interrupted.status)
    print_report(report, title=title)
    print(f"written to {output_dir}")
    return 0


def play(cfg: RunConfig, output_dir: Path) -> Report:
    """The whole cluster in this process."""
    if is_under_torchrun():
        raise ValueError(f"exec={cfg.exec} under torchrun: expected exec=distributed, or python scripts/run.py")
    cluster = LocalCluster(cfg)
    print(f"pool of an instance: {cluster.memory}")
    if cluster.moved:
        print(f"a token's KV, when it moves: {cluster.moved}")
    with Progress() as progress:
        report = cluster.run(output_dir, progress=progress)
    model = cluster.engine.model
    if model is not None and model.decode_graph is not None:
        print(f"decode step compiled in {model.decode_graph.compile_s:.0f} s (cached for the next run)")
    return report


def control(cfg: RunConfig, output_dir: Path) -> Report:
    """Rank 0 of a distributed cluster."""
    check_wired(cfg)
    place = find_place(cfg)
    if place.rank != CONTROLLER:
        raise ValueError(f"cluster.member={cfg.cluster.member}: expected on the command line itself")
    if cfg.cluster.store is not None:
        members = ", ".join(map(str, range(len(cfg.cluster.roles) + cfg.cluster.spares)))
        print(f"waits at {cfg.cluster.store} for cluster.member={members}", flush=True)
    place.store.set("output_dir", str(output_dir.resolve()))
    log_to(output_dir / "rank-0.log")
    with Progress() as progress:
        report = DistributedCluster(cfg, place, TORCHRUN).run(output_dir, progress=progress)
    assert report is not None, "rank 0 reports"
    return report


def serve(words: list[str]) -> None:
    """Any other rank: an instance. Rank 0 alone has an output directory; here is only a log in it."""
    try:
        cfg = load_config(of_configuration(words))
        if cfg.exec != "distributed":
            sys.exit(0)  # rank 0 says why
        check_wired(cfg)  # before it waits for a rank 0 that is refused
        if cfg.cluster.store is not None:
            print(f"cluster.member={cfg.cluster.member} looks for the scheduler at {cfg.cluster.store}", flush=True)
        place = find_place(cfg)
        log_to(Path(place.store.get("output_dir").decode()) / f"rank-{place.rank}.log")
        DistributedCluster(cfg, place, TORCHRUN).run()
    except RunOver as error:
        print(error)  # and torchrun need not try again
    except LeftEarly as error:
        logging.error("%s", error)
        sys.exit(0 if cfg.cluster.store is not None else 1)  # rank 0 says why
    except GroupBroken as error:
        logging.error("%s", error)
        sys.exit(1)
    except Interrupted as interrupted:
        logging.error("%s", interrupted)
        sys.exit(interrupted.status)
    except DistError as error:  # which of its own only says that a connection was closed
        sys.exit(f"error: the cluster's store does not answer any more: {error}")
    except (ValueError, MemoryError, InvalidLogits) as error:
        sys.exit(told(error))


def log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=path, level=logging.INFO, format="%(asctime)s %(message)s", force=True)


if __name__ == "__main__":
    try:
        sys.argv[1:] = with_search(sys.argv[1:])
        check_words(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        if is_first(sys.argv[1:]):
            main()
        else:
            serve(sys.argv[1:])
    except KeyboardInterrupt:  # of a run in this process, a sweep (what has ended stays), a rank with nothing to leave
        print("error: interrupted by SIGINT", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except Interrupted as interrupted:  # a sweep, while it waited for a point
        print(f"error: {interrupted}", file=sys.stderr, flush=True)
        sys.exit(interrupted.status)
