"""Build: from a RunConfig to the objects that run it. Knows every part's constructor and no loop."""

import gc
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch

from memserve.cluster.capacity import capacity, check_fits, limits_of, rank_geometry, stored_geometry
from memserve.cluster.costs import build_cost_model, computing_role, predicted, price_of_attention
from memserve.cluster.engine import Engine, eos_token_ids
from memserve.cluster.idle_runner import IdleRunner
from memserve.cluster.make import asks, make, make_asking, maker
from memserve.cluster.step_time import Measured, Modelled, StepTime
from memserve.cluster.wiring import build_global_scheduler, build_handoffs, build_scaling, check_migration
from memserve.cluster.worker import Followers, ParallelCopier, ParallelRunner
from memserve.config.checks_of_roles import check_roles_of_mode
from memserve.config.errors import ConfigError
from memserve.config.per_role import num_ranks, of_role
from memserve.config.schema import RunConfig
from memserve.hash_runner import HashRunner
from memserve.instance import Instance
from memserve.kvcache.arena import Arena, TwoTiers
from memserve.kvcache.block_pool import BlockPool, IndexFactory
from memserve.kvcache.copy_engine import AtOnce, BlockCopier, CopyEngine, InVirtualTime, NothingToCopy, OnAThread
from memserve.kvcache.index import Index, NullIndex
from memserve.model.near_ties import NearTieCounter
from memserve.model.no_tokenizer import NoTokenizer
from memserve.model.runner import ModelRunner
from memserve.model.sampler import Sampler
from memserve.request import SERVING, Role, Runner
from memserve.sched.cost_model.base import CostModel
from memserve.sched.local_scheduler import LocalScheduler
from memserve.sched.modes import Mode, check_mode
from memserve.sched.queue_policy import QueuePolicy
from memserve.trace_runner import TraceRunner
from memserve.transfer.transport import Transport


@dataclass(frozen=True)
class RankPart:
    """What an instance has on one of its ranks. memories: of HBM and DRAM; None where nothing is stored."""

    runner: Runner
    copier: BlockCopier
    memories: list[torch.Tensor | None]


def build_part(cfg: RunConfig, engine: Engine, role: Role) -> RankPart:
    """One rank's runner and memory of an instance. Raises MemoryError where the blocks cannot be had."""
    if cfg.tokens == "workload":
        return RankPart(TraceRunner(engine.vocab_size, eos_token_ids(engine)), NothingToCopy(), [None, None])
    geometry = rank_geometry(cfg, engine.config, role)
    num_blocks, num_dram_blocks = capacity(cfg, role, geometry)
    geometry = stored_geometry(cfg, engine.config, role)
    device = torch.device(cfg.model.device if engine.model and role is not Role.STORE else "cpu")
    if device.type == "cuda":
        gc.collect()  # an instance of before is a cycle of objects, and its blocks may be most of the GPU's memory
    hbm = Arena(make(cfg.layout), geometry, num_blocks, device)
    pinned = device.type != "cpu" and num_dram_blocks > 0
    dram = Arena(make(cfg.layout), geometry, num_dram_blocks, torch.device("cpu"), pinned=pinned)
    runner = IdleRunner() if role is Role.STORE else _runner(cfg, engine, hbm.kv)
    return RankPart(runner, TwoTiers(hbm, dram, num_blocks), [hbm.tensor, dram.tensor])


def _led(part: RankPart, followers: Followers) -> RankPart:
    """A leader's part, that stands for all ranks of its instance."""
    assert isinstance(part.runner, ModelRunner), "what is split is a model"
    return RankPart(ParallelRunner(part.runner, followers), ParallelCopier(part.copier, followers), part.memories)


def build_instance(
    cfg: RunConfig,
    engine: Engine,
    label: str,
    role: Role,
    incarnation: int,
    transport: Transport | None = None,
    followers: Followers | None = None,
    *,
    in_real_time: bool = False,
) -> Instance:
    """One instance with its own pool, scheduler and runner. transport: what its mode hands KV over with.

    followers: the other ranks of an instance of several.  in_real_time: whoever drives it goes by the machine's clock.
    Raises ConfigError for what does not fit, and MemoryError where the blocks cannot be had.
    """
    everybody, cfg = cfg, of_role(cfg, role)
    costs = build_cost_model(everybody, engine.model, computing_role(everybody, role))
    geometry = rank_geometry(cfg, engine.config, role)
    num_blocks, num_dram_blocks = capacity(everybody, role, geometry)
    check_fits(costs, num_blocks * geometry.block_bytes)
    part = build_part(cfg, engine, role)
    part = part if followers is None else _led(part, followers)
    pool = BlockPool(
        num_blocks,
        cfg.kvcache.block_size,
        index_factory(cfg, costs),
        num_dram_blocks=num_dram_blocks,
        engine=_swap_engine(cfg, part.copier, costs, in_real_time),
    )
    queue: QueuePolicy = make(cfg.queue)
    handoffs = None
    if transport is not None:
        handoffs = build_handoffs(
            cfg, role, pool, incarnation, geometry, transport, part.memories, costs, queue, num_ranks(cfg, role)
        )  # fmt: skip
    return Instance(
        label,
        role,
        _scheduler(cfg, role, pool, costs, queue),
        part.runner,
        limits_of(everybody, engine.config, role, engine.max_context, engine.vocab_size),
        eos_token_ids=eos_token_ids(engine),
        tokenizer=None if isinstance(engine.tokenizer, NoTokenizer) else engine.tokenizer,
        seed=cfg.seed,
        handoffs=handoffs,
    )


def _scheduler(cfg: RunConfig, role: Role, pool: BlockPool, costs: CostModel, queue: QueuePolicy) -> LocalScheduler:
    mode: Mode = make(cfg.mode)
    return LocalScheduler(
        pool,
        queue,
        make(cfg.preemption),
        make_asking(cfg.swap, costs=predicted(cfg, costs), block_size=cfg.kvcache.block_size),
        token_budget=cfg.sched.token_budget,
        chunk_size=cfg.sched.chunk_size,
        max_running=cfg.sched.max_running,
        swap_ahead_blocks=cfg.kvcache.swap_ahead_blocks,
        lookahead=cfg.sched.lookahead,
        publishes=mode.inserts(role),
        batching=make(cfg.batching),
    )


def _swap_engine(cfg: RunConfig, copier: BlockCopier, costs: CostModel, in_real_time: bool) -> CopyEngine:
    """In virtual time a copy takes what the cost model says, and the machine's where time is the machine's."""
    if not cfg.kvcache.async_swap:
        return AtOnce(copier)
    return OnAThread(copier) if in_real_time else InVirtualTime(copier, costs.swap_time_s)


def _runner(cfg: RunConfig, engine: Engine, kv: torch.Tensor) -> Runner:
    if engine.model is None:
        return HashRunner(kv, engine.vocab_size)
    counts = cfg.model.dtype == "float32" if cfg.model.near_ties is None else cfg.model.near_ties
    sampler = NearTieCounter() if counts else Sampler()
    return ModelRunner(engine.model, kv, cfg.kvcache.block_size, attention=cfg.model.attention, sampler=sampler)


def index_factory(cfg: RunConfig, costs: CostModel) -> IndexFactory:
    """Makes an instance's index; the eviction order goes to the kinds of index that ask for it, with its prices.

    Raises ConfigError for a DRAM tier under an index that could not tell where its blocks have gone.
    """
    target, kv = maker(cfg.index), cfg.kvcache
    kind = cast(type[Index], target.func)
    if (kv.num_dram_blocks or kv.dram_bytes is not None) and not (kind.moves_blocks or issubclass(kind, NullIndex)):
        raise ConfigError(
            f"index={kind.__name__} contradicts a DRAM tier: its blocks cannot be followed when they move"
        )
    if not asks(cfg.index, "eviction"):
        return cast(IndexFactory, target)
    return cast(IndexFactory, partial(target, eviction=make(cfg.eviction, **price_of_attention(cfg.eviction, costs))))


def build_step_time(cfg: RunConfig, roles: Collection[Role], engine: Engine) -> StepTime:
    """roles: that there are."""
    if cfg.step_time == "measured":
        return Measured(engine.model.device if engine.model else None)
    computing = [role for role in roles if role in SERVING]
    return Modelled({role: build_cost_model(cfg, engine.model, role) for role in computing})


def build_roles(cfg: RunConfig) -> list[tuple[str, Role]]:
    """(label, role) of each instance. Raises ConfigError if the mode needs other roles, or is none."""
    mode: Mode = make(cfg.mode)
    try:
        check_mode(mode)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_roles_of_mode(cfg, mode.roles)
    return [(f"{role}-{i}", role) for i, role in enumerate(map(Role, cfg.cluster.roles))]


def check_wired(cfg: RunConfig) -> None:
    """Raises ConfigError for what cannot be one cluster, as far as that is seen without model, peers and the workload's
    files: whoever has the words can tell alone.
    """
    roles = build_roles(cfg)
    build_global_scheduler(cfg, roles, np.random.default_rng(cfg.seed))
    build_scaling(cfg, [role for _, role in roles])
    check_migration(cfg)
    make(cfg.workload)
