"""Wiring: what connects a cluster's instances, built from a RunConfig: transport, transfers, global scheduler."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch.distributed.distributed_c10d import Store

from memserve.bequest import Bequest
from memserve.clock import to_ns
from memserve.cluster.capacity import bytes_per_stored, capacity, rank_geometry
from memserve.cluster.costs import costs_of, predicted
from memserve.cluster.make import asks, make, make_asking, maker
from memserve.compose import group_of
from memserve.config.checks import keeps_kv_on_gpu
from memserve.config.errors import ConfigError
from memserve.config.per_role import num_ranks
from memserve.config.schema import RunConfig
from memserve.config.targets import node_class
from memserve.deposits import Deposits
from memserve.fetches import Fetches
from memserve.handoff import Handoffs
from memserve.kvcache.address_book import AddressBook
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.granularity import Granularity
from memserve.kvcache.index import NullIndex
from memserve.kvcache.layout import CacheGeometry
from memserve.kvcache.ticket import GrantLimits, Timeouts
from memserve.kvcache.transfers import Transfers
from memserve.migrations import Migrations
from memserve.model.model_config import ModelConfig
from memserve.request import TAKING, Role
from memserve.sched.cost_model.base import CostModel
from memserve.sched.cost_model.transfer import TransferCost
from memserve.sched.departures import EndThere
from memserve.sched.fetch_policy import FetchPrices, NeverFetch
from memserve.sched.global_scheduler import GlobalScheduler
from memserve.sched.group import Group
from memserve.sched.heirs import NoHeir
from memserve.sched.holders import Holders
from memserve.sched.migration import MigrationPolicy, StopAndCopy
from memserve.sched.modes import Mode
from memserve.sched.prompt_tree import MANY_BLOCKS, Exact, NoPromptTree, PromptIndex
from memserve.sched.queue_policy import QueuePolicy
from memserve.sched.rebalancing import NoRebalancing
from memserve.sched.rejection import Rejection
from memserve.sched.routing import Policy
from memserve.sched.scaling import Scaling, Schedule
from memserve.sched.store_policy import NoStore, StorePolicy
from memserve.transfer.in_process import InProcess
from memserve.transfer.transport import Transport
from memserve.values import require_int
from memserve.words import level_of_word
from memserve.workload.session import Workload

_MOVES_NOTHING = {"fetch": NeverFetch, "heir": NoHeir, "departure": EndThere, "rebalancing": NoRebalancing}


def build_transport(cfg: RunConfig) -> InProcess | None:
    """What moves KV between the instances of this process; None where none is to."""
    if not transfers_kv(cfg):
        return None
    transport: InProcess = make_asking(cfg.transport, link=make(cfg.link))
    transport.bytes_per_stored = bytes_per_stored(cfg)
    return transport


def transfers_kv(cfg: RunConfig) -> bool:
    """Whether KV moves between instances."""
    mode: Mode = make(cfg.mode)
    return mode.hand_off is not None or any(_moves_kv(cfg, group) for group in _MOVES_NOTHING)


def _moves_kv(cfg: RunConfig, group: str) -> bool:
    """Whether a group's word is another than its baseline."""
    return not isinstance(make(getattr(cfg, group)), _MOVES_NOTHING[group])


def build_process_transport(cfg: RunConfig, store: Store, host: str) -> Transport | None:
    """What moves KV between instances that are processes; None where nothing is.

    store: of all of them.  host: this process's address, as the others reach it.
    """
    if not transfers_kv(cfg):
        return None
    transport: Transport = make_asking(cfg.transport, store=store, host=host, gpu=_gpu(cfg))
    return transport


def _gpu(cfg: RunConfig) -> int | None:
    """The number of the GPU that this process's KV lies on; None where that is in host memory, or on no CUDA device."""
    device = torch.device(cfg.model.device)
    if not keeps_kv_on_gpu(cfg) or device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def build_handoffs(
    cfg: RunConfig,
    role: Role,
    pool: BlockPool,
    incarnation: int,
    geometry: CacheGeometry,
    transport: Transport,
    memories: Sequence[torch.Tensor | None],
    costs: CostModel,
    queue: QueuePolicy,
    num_ranks: int = 1,
) -> Handoffs:
    """One instance's transfers. geometry, memories: of one rank's HBM and DRAM, of num_ranks over which its heads are
    split; None where nothing is stored.  costs: of computing.  queue: the order of its requests.
    """
    t, granularity = cfg.transfer, _granularity(cfg, geometry, num_ranks)
    timeouts = Timeouts(to_ns(t.deadline_s), to_ns(t.patience_s), to_ns(t.retry_s))
    transfers = Transfers(
        pool,
        AddressBook(pool.allocator, incarnation),
        transport,
        memories,
        granularity,
        timeouts,
        _grant_limits(cfg, role),
    )
    transfers.order_by(partial(level_of_word, queue))
    transfer = TransferCost.of(make(cfg.link), granularity, geometry.num_layers)
    prices = FetchPrices(predicted(cfg, costs), transfer, cfg.kvcache.block_size)
    fetches = Fetches(transfers, pool, make(cfg.fetch), prices, timeouts)
    deposits, migrations = _deposits(cfg, role, transfers, pool), Migrations(transfers, make(cfg.migration))
    return Handoffs(transfers, make(cfg.mode), fetches, Bequest(transfers, pool), deposits, migrations)


def _grant_limits(cfg: RunConfig, role: Role) -> GrantLimits:
    """Who decodes keeps room for its running requests; a store takes so much at a time."""
    if role is Role.STORE:
        policy: StorePolicy = make(cfg.store)
        return GrantLimits(max_best_effort=require_int(f"{type(policy).__name__}.max_incoming", policy.max_incoming, 1))
    return GrantLimits(0 if role is Role.PREFILL else cfg.sched.decode_headroom_blocks)


def check_migration(cfg: RunConfig) -> None:
    """Raises ConfigError where nothing can go ahead of an answer that migrates."""
    policy: MigrationPolicy = make(cfg.migration)
    if isinstance(policy, StopAndCopy):
        return
    name, mode = f"migration={type(policy).__name__}", make(cfg.mode)
    if not (_moves_kv(cfg, "departure") or _moves_kv(cfg, "rebalancing")):
        raise ConfigError(f"{name} contradicts departure=wait and rebalancing=none: no answer migrates")
    if _caches_nothing(cfg) or not mode.keeps_received:
        word = "index=none" if _caches_nothing(cfg) else f"mode {type(mode).__name__}"
        raise ConfigError(f"{name} contradicts {word}: what goes ahead of an answer is kept by an index where it goes; "
                          "expected migration=stop_and_copy")  # fmt: skip


def _deposits(cfg: RunConfig, role: Role, transfers: Transfers, pool: BlockPool) -> Deposits:
    """Who takes requests gives to the stores; a decode instance's KV is given by who prefilled it, once it has that."""
    stores = [number for number, of in enumerate(cfg.cluster.roles) if of == Role.STORE] if role in TAKING else []
    policy: StorePolicy = make(cfg.store) if stores else NoStore()
    if policy.asks_index and not pool.index.ranks_blocks:
        raise ConfigError(
            f"store={type(policy).__name__} contradicts index={type(pool.index).__name__}, which tells neither uses "
            "nor what goes next: expected store=write_through, or index=radix"
        )
    return Deposits(transfers, pool, policy, stores)


def _granularity(cfg: RunConfig, geometry: CacheGeometry, num_ranks: int) -> Granularity:
    try:
        granularity: Granularity = maker(cfg.granularity)(make(cfg.layout), geometry, num_ranks=num_ranks)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return granularity


def build_global_scheduler(
    cfg: RunConfig, members: Sequence[tuple[str, Role]], rng: np.random.Generator, config: ModelConfig | None = None
) -> GlobalScheduler:
    """Routes over the members (label, role) that take requests, and over those that decode for them.

    config: of the model that runs; None where none does, or to see whether the words fit.
    """
    takers = [(label, i) for i, (label, role) in enumerate(members) if role in TAKING]
    decoders, stores = (
        [(label, i) for i, (label, role) in enumerate(members) if role is of] for of in (Role.DECODE, Role.STORE)
    )
    taking, decoding = (Role.PREFILL, Role.DECODE) if decoders else (Role.COLOCATED, Role.COLOCATED)
    return GlobalScheduler(
        _group(cfg, "policy", taking, takers, config),
        rng,
        decode=_group(cfg, "decode_policy", decoding, decoders, config) if decoders else None,
        mode=make(cfg.mode),
        recompute_failed=cfg.transfer.on_failure == "recompute",
        max_unfinished=cfg.cluster.max_unfinished,
        patience_ns=to_ns(cfg.cluster.patience_s),
        rejection=_rejection(cfg, decoding),
        departure=make(cfg.departure),
        rebalancing=make(cfg.rebalancing),
        stores=_stores(cfg, stores, config) if stores else None,
    )


def _rejection(cfg: RunConfig, decoding: Role) -> Rejection:
    """With the costs of who decodes, and the objectives that classes of the workload have of their own."""
    offers: dict[str, object] = {"cost_model": predicted(cfg, costs_of(cfg, decoding))}
    if asks(cfg.rejection, "objectives"):
        workload: Workload = make(cfg.workload)
        offers["objectives"] = {each.name: each.objectives for each in workload.classes}
    rejection: Rejection = make_asking(cfg.rejection, **offers)
    return rejection


def _stores(cfg: RunConfig, members: Sequence[tuple[str, int]], config: ModelConfig | None) -> Holders:
    labels, numbers = [label for label, _ in members], [number for _, number in members]
    return Holders(labels, numbers, _prompt_index(cfg, Role.STORE, len(members), config))


def build_scaling(cfg: RunConfig, roles: Sequence[Role]) -> Scaling:
    """Who comes and goes. Raises ConfigError for what a cluster that begins with these roles cannot do."""
    scaling: Scaling = make(cfg.scaling)
    try:
        scaling.begin(roles)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if cfg.exec == "distributed" and isinstance(scaling, Schedule) and scaling.crashes:
        raise ConfigError(f"scaling.changes: {scaling.crashes[0]} contradicts exec=distributed: expected that whoever "
                          "started the process kills it")  # fmt: skip
    most, num_ranks = scaling.most_instances, len(roles) + cfg.cluster.spares
    if cfg.exec == "distributed" and most is not None and most > num_ranks:
        raise ConfigError(f"scaling.max_instances={most} contradicts cluster.spares={cfg.cluster.spares}: "
                          f"expected {num_ranks} at most, or {most - len(roles)} spares")  # fmt: skip
    return scaling


def follows_events(cfg: RunConfig) -> bool:
    """Whether the global scheduler wants to hear of every change of the instances' indexes."""
    return issubclass(node_class(cfg.index_source), Exact) and not _caches_nothing(cfg)


def _group(
    cfg: RunConfig, name: str, role: Role, members: Sequence[tuple[str, int]], config: ModelConfig | None
) -> Group:
    """name: of its policy's node.  role: of its instances."""
    costs = costs_of(cfg, role)
    prediction = predicted(cfg, costs)
    policy: Policy = make_asking(getattr(cfg, name), cost_model=prediction)
    tree = _prompt_index(cfg, role, len(members), config)
    if policy.looks_at_prefixes and isinstance(tree, NoPromptTree):
        option = "index=none" if _caches_nothing(cfg) else "index_source=none"
        raise ConfigError(f"{group_of(name)}={type(policy).__name__} contradicts {option}: it looks at cached prefixes")
    priced, predicts = (None, None) if role is Role.DECODE else (costs, prediction)
    labels, numbers = [label for label, _ in members], [number for _, number in members]
    return Group(labels, numbers, policy, tree, priced, predicts, num_ranks(cfg, role))


def _prompt_index(cfg: RunConfig, role: str, num_rows: int, config: ModelConfig | None) -> PromptIndex:
    """What is believed of the caches of a role's instances; where they cache nothing there is nothing to believe."""
    if _caches_nothing(cfg):
        return NoPromptTree(num_rows, cfg.kvcache.block_size)
    options = {"num_rows": num_rows, "block_size": cfg.kvcache.block_size}
    if cfg.index_source.get("max_blocks", 0) is None:
        options["max_blocks"] = _num_believed(cfg, role, config)
    tree: PromptIndex = make(cfg.index_source, **options)
    return tree


def _num_believed(cfg: RunConfig, role: str, config: ModelConfig | None) -> int:
    """Blocks that a role's instance can cache; where a model is to run that is not known yet, many."""
    if cfg.tokens == "model" and config is None:
        return MANY_BLOCKS
    return sum(capacity(cfg, role, rank_geometry(cfg, config, role)))


def _caches_nothing(cfg: RunConfig) -> bool:
    return maker(cfg.index).func is NullIndex
