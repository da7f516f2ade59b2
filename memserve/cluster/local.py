"""LocalCluster: a configuration's cluster in this process. Builds it, plays the workload, reports.

    report = LocalCluster(load_config(["index=none", "workload.num_sessions=4"])).run()

Each repeat starts from empty pools and the same sessions. A measured run is preceded by a warm-up before time 0.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate

from memserve.clock import monotonic_ns, to_s
from memserve.cluster.build import Engine, build_engine, build_instance, build_roles, build_step_time
from memserve.cluster.emulated import EmulatedCluster, Node
from memserve.compose import to_yaml
from memserve.config.schema import RunConfig
from memserve.instance import Instance
from memserve.messages import Dispatch, pack_tokens
from memserve.metrics.output import write_output
from memserve.metrics.progress import Progress
from memserve.metrics.report import InstanceStats, build_report, median_of
from memserve.metrics.table import print_report
from memserve.request import SamplingParams
from memserve.sched.global_scheduler import GlobalScheduler
from memserve.workload.player import SessionPlayer
from memserve.workload.session import Session, Workload

WARM_UP_PROMPTS = (64, 17, 300)  # tokens: prefill, mixed and decode steps of every kind run once
WARM_UP_TOKENS = 8


class LocalCluster:
    """Instances, global scheduler and client of one process, emulated or simulated.

    Raises ConfigError or ValueError, before anything runs, for what cannot be run as configured.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self._roles = build_roles(cfg)
        workload: Workload = instantiate(cfg.workload)
        self.engine: Engine = build_engine(cfg)
        self._sessions: list[Session] = workload.sessions(self.engine.tokenizer, cfg.seed)
        self._concurrency = workload.concurrency
