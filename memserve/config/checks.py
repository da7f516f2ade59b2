"""Cross-field checks of a composed configuration. Each failure names the option, its value and what is allowed."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from memserve.clock import LONGEST_S
from memserve.config.checks_of_members import (
    check_departure,
    check_heir,
    check_member,
    check_rebalancing,
    check_scaling,
)
from memserve.config.checks_of_roles import check_per_role, check_roles, check_tensor_parallel
from memserve.config.errors import ConfigError, class_name, require
from memserve.config.per_role import num_ranks
from memserve.config.runs import check_runs
from memserve.config.schema import RunConfig, SloConfig
from memserve.config.sizes import parse_bytes
from memserve.config.targets import is_a, node_class
from memserve.request import Role

CHOICES = {
    "exec": ("emulated", "simulated", "distributed"),
    "step_time": ("measured", "model"),
    "tokens": ("model", "hash", "workload"),
}
FETCHES = {"AlwaysFetch": "always", "FetchIfCheaper": "cost"}  # policies, and their words
TRANSPORTS = {"InProcess": "in_process", "Gloo": "gloo", "Nccl": "nccl", "Mapped": "mapped"}  # these, and theirs
ON_FAILURE = ("recompute", "fail")
DTYPES = ("float32", "bfloat16", "float16")
MAX_BLOCK_SIZE = 1024
MAX_SIDE = 2**16  # of a simulated model's KV: layers, heads, elements
SHORTEST_S = 1e-6  # of what is repeated until it is answered
MAX_CHANNELS = 64  # process groups of each pair, with a thread each at both ends
OF_TRANSPORT = {"channels": (1, MAX_CHANNELS), "patience_s": (SHORTEST_S, LONGEST_S)}  # what ours can be told
CONTROL = ("latency_s", "request_s")
LINK = {  # what a link can be; a message on its way is repeated every transfer.retry_s
    "latency_s": (0.0, 3600.0),
    "message_latency_s": (0.0, 3600.0),
    "gb_per_s": (1e-6, float("inf")),
}


def check_config(cfg: RunConfig) -> None:
    """Raises ConfigError for a value out of range or a contradiction between two of them."""
    for name, allowed in CHOICES.items():
        require(getattr(cfg, name) in allowed, name, getattr(cfg, name), f"one of {', '.join(allowed)}")
    check_runs(cfg)
    require(1 <= cfg.channels <= MAX_CHANNELS, "channels", cfg.channels, f"an integer from 1 to {MAX_CHANNELS}")
    require(1 <= cfg.kvcache.block_size <= MAX_BLOCK_SIZE, "kvcache.block_size", cfg.kvcache.block_size,
             f"an integer from 1 to {MAX_BLOCK_SIZE}")  # fmt: skip
    if cfg.channels > 1 and "channels" not in cfg.transport:
        raise ConfigError(f"channels={cfg.channels} contradicts transport={_word(cfg.transport, TRANSPORTS)}: expected "
                          "gloo or nccl, or 1")  # fmt: skip
    _check_geometry(cfg)
    _check_capacity(cfg)
    dram_bytes = cfg.kvcache.dram_bytes
    is_tiered = bool(cfg.kvcache.num_dram_blocks or (dram_bytes is not None and parse_bytes(dram_bytes)))
    if is_a(cfg.preemption, "SwapOut") and not is_tiered:
        raise ConfigError("preemption=swap contradicts kvcache.num_dram_blocks=0: expected an integer >= 1")
    if is_tiered and is_a(cfg.index, "HashIndex"):
        raise ConfigError("index=hash contradicts a DRAM tier: its blocks cannot be followed when they move")
    _check_async_swap(cfg, is_tiered)
    _check_lookahead(cfg)
    for name in ("token_budget", "chunk_size", "max_running"):
        value = getattr(cfg.sched, name)
        require(value is None or value >= 1, f"sched.{name}", value, "an integer >= 1")
    _check_transfer(cfg)
    _check_slo(cfg)
    _check_measure(cfg)
    _check_control(cfg)
    _check_model(cfg)
    _check_execution(cfg)
    check_roles(cfg)
    _check_fetch(cfg)
    check_tensor_parallel(cfg)
    check_per_role(cfg)
    check_scaling(cfg)
    check_heir(cfg)
    check_departure(cfg)
    check_rebalancing(cfg)
    check_member(cfg)


def _check_geometry(cfg: RunConfig) -> None:
    geometry = cfg.geometry
    if geometry is None:
        return
    for name in ("num_layers", "num_kv_heads", "head_dim"):
        value = getattr(geometry, name)
        require(1 <= value <= MAX_SIDE, f"geometry.{name}", value, f"an integer from 1 to {MAX_SIDE}")
    require(geometry.dtype in DTYPES, "geometry.dtype", geometry.dtype, f"one of {', '.join(DTYPES)}")
    said = f"geometry.num_layers={geometry.num_layers}"
    if cfg.exec != "simulated":
        what = f"tokens={cfg.tokens}" if cfg.tokens == "model" else f"exec={cfg.exec}"
        raise ConfigError(f"{said} contradicts {what}, whose KV moves as it is stored: expected exec=simulated, or "
                          "geometry=own")  # fmt: skip


def _check_capacity(cfg: RunConfig) -> None:
    """Each medium is given in blocks or in bytes."""
    kv = cfg.kvcache
    require(kv.num_hbm_blocks is None or kv.num_hbm_blocks >= 1, "kvcache.num_hbm_blocks", kv.num_hbm_blocks,
             "an integer >= 1")  # fmt: skip
    require(kv.num_dram_blocks >= 0, "kvcache.num_dram_blocks", kv.num_dram_blocks, "an integer >= 0")
    for name in ("hbm_bytes", "dram_bytes"):
        value = getattr(kv, name)
        if value is None:
            continue
        try:
            parse_bytes(value)
        except ValueError as error:
            raise ConfigError(f"kvcache.{name}={error}") from error
        if cfg.tokens == "workload" and cfg.geometry is None:
            raise ConfigError(f"kvcache.{name}={value} contradicts tokens=workload with geometry=own: its blocks have "
                              "no bytes")  # fmt: skip
    if kv.hbm_bytes is not None and kv.num_hbm_blocks is not None:
        raise ConfigError(f"kvcache.hbm_bytes={kv.hbm_bytes} contradicts kvcache.num_hbm_blocks={kv.num_hbm_blocks}: "
                          "expected one of them, and null for the other")  # fmt: skip
    if kv.hbm_bytes is None and kv.num_hbm_blocks is None:
        raise ConfigError("kvcache.num_hbm_blocks=null and kvcache.hbm_bytes=null: expected one of them")
    if kv.dram_bytes is not None and kv.num_dram_blocks:
        raise ConfigError(f"kvcache.dram_bytes={kv.dram_bytes} contradicts kvcache.num_dram_blocks="
                          f"{kv.num_dram_blocks}: expected one of them, and 0 blocks beside bytes")  # fmt: skip


def _check_async_swap(cfg: RunConfig, is_tiered: bool) -> None:
    kv = cfg.kvcache
    require(kv.swap_ahead_blocks >= 0, "kvcache.swap_ahead_blocks", kv.swap_ahead_blocks, "an integer >= 0")
    if kv.num_hbm_blocks is not None and kv.swap_ahead_blocks > kv.num_hbm_blocks:
        raise ConfigError(f"kvcache.swap_ahead_blocks={kv.swap_ahead_blocks} contradicts kvcache.num_hbm_blocks="
                          f"{kv.num_hbm_blocks}: expected no more")  # fmt: skip
    if kv.swap_ahead_blocks and not kv.async_swap:
        raise ConfigError(f"kvcache.swap_ahead_blocks={kv.swap_ahead_blocks} contradicts kvcache.async_swap=false: "
                          "blocks that everybody waits for are moved when they are needed")  # fmt: skip
    if not kv.async_swap:
        return
    if not is_tiered:
        raise ConfigError("kvcache.async_swap=true contradicts kvcache.num_dram_blocks=0: expected an integer >= 1")
    if cfg.exec == "distributed" and max(num_ranks(cfg, role) for role in Role) > 1:
        raise ConfigError("kvcache.async_swap=true contradicts cluster.tensor_parallel above 1: the ranks of an "
                          "instance copy together, between two steps")  # fmt: skip


def _check_lookahead(cfg: RunConfig) -> None:
    """There is something to keep, in an order that goes by when it was last used."""
    lookahead = cfg.sched.lookahead
    require(lookahead >= 0, "sched.lookahead", lookahead, "an integer >= 0")
    if lookahead and is_a(cfg.index, "NullIndex"):
        raise ConfigError(f"sched.lookahead={lookahead} contradicts index=none: nothing is cached; expected 0")
    if lookahead and is_a(cfg.eviction, "FIFO"):
        raise ConfigError(f"sched.lookahead={lookahead} contradicts eviction=fifo, which goes by when blocks came: "
                          "expected another order, or 0")  # fmt: skip


def _check_transfer(cfg: RunConfig) -> None:
    for name in ("deadline_s", "patience_s", "retry_s"):
        value = getattr(cfg.transfer, name)
        require(SHORTEST_S <= value <= LONGEST_S, f"transfer.{name}", value,
                 f"seconds in [{SHORTEST_S:g}, {LONGEST_S:g}]")  # fmt: skip
    _check_numbers("link", cfg.link, LINK)
    _check_numbers("transport", cfg.transport, OF_TRANSPORT)
    require(cfg.transfer.on_failure in ON_FAILURE, "transfer.on_failure", cfg.transfer.on_failure,
             f"one of {', '.join(ON_FAILURE)}")  # fmt: skip
    silence_s = cfg.cluster.silence_s
    require(1 <= silence_s <= LONGEST_S, "cluster.silence_s", silence_s, f"seconds in [1, {LONGEST_S:g}]")
    patience_s = cfg.cluster.patience_s
    require(0 <= patience_s <= LONGEST_S, "cluster.patience_s", patience_s, f"seconds in [0, {LONGEST_S:g}]")
    bound = cfg.cluster.max_unfinished
    require(bound is None or bound >= 1, "cluster.max_unfinished", bound, "null or an integer >= 1")
    headroom = cfg.sched.decode_headroom_blocks
    require(headroom >= 0, "sched.decode_headroom_blocks", headroom, "an integer >= 0")


def _check_numbers(group: str, node: Mapping[str, Any], ranges: Mapping[str, tuple[float, float]]) -> None:
    """Those of these options that a node has."""
    for name, (low, high) in ranges.items():
        value = node.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            require(low <= value <= high, f"{group}.{name}", value, f"a number in [{low:g}, {high:g}]")


def _check_slo(cfg: RunConfig) -> None:
    for name in (objective.name for objective in fields(SloConfig)):
        value = getattr(cfg.slo, name)
        require(value is None or 0 < value <= LONGEST_S, f"slo.{name}", value,
                f"null or seconds in (0, {LONGEST_S:g}]")  # fmt: skip


def _check_measure(cfg: RunConfig) -> None:
    from_s, until_s = cfg.measure.from_s, cfg.measure.until_s
    for name, value in (("measure.from_s", from_s), ("measure.until_s", until_s)):
        require(value is None or 0 <= value <= LONGEST_S, name, value, f"null or seconds in [0, {LONGEST_S:g}]")
    if until_s is not None and until_s <= (from_s or 0.0):
        raise ConfigError(f"measure.until_s={until_s} contradicts measure.from_s={from_s}: expected seconds beyond it")


def _check_control(cfg: RunConfig) -> None:
    """Messages and routing cost virtual time, where time is virtual."""
    _check_numbers("control", vars(cfg.control), dict.fromkeys(CONTROL, (0.0, 3600.0)))
    for name in CONTROL:
        if (value := getattr(cfg.control, name)) and cfg.exec == "distributed":
            raise ConfigError(f"control.{name}={value} contradicts exec=distributed, whose messages and routing take "
                              "what they take: expected 0, or exec=emulated or simulated")  # fmt: skip


def _check_model(cfg: RunConfig) -> None:
    model = cfg.model
    require(model.dtype in DTYPES, "model.dtype", model.dtype, f"one of {', '.join(DTYPES)}")
    for name in ("max_context", "num_threads"):
        value = getattr(model, name)
        least = 2 if name == "max_context" else 1
        require(value is None or value >= least, f"model.{name}", value, f"null or an integer >= {least}")
    require(model.fused_rows >= 0, "model.fused_rows", model.fused_rows, "an integer >= 0")
    if model.fused_rows and not model.compile:
        raise ConfigError(f"model.fused_rows={model.fused_rows} contradicts model.compile=false: expected 0")
    if model.early_launches and not model.compile:
        raise ConfigError("model.early_launches=true contradicts model.compile=false: expected false")
    if model.near_ties and (cfg.tokens, model.dtype) != ("model", "float32"):
        said = f"model.dtype={model.dtype}" if cfg.tokens == "model" else f"tokens={cfg.tokens}, which has no logits"
        raise ConfigError(f"model.near_ties=true contradicts {said}: expected null or false, or a model in float32")
    if model.compile and "." in model.attention:
        raise ConfigError(f"model.attention={model.attention} contradicts model.compile=true: compiled decode steps "
                          "have an attention of their own")  # fmt: skip
    if cfg.tokens == "model" and (model.path is None) == (model.random is None):
        raise ConfigError(
            f"model.path={model.path!r} and model.random={'given' if model.random else None}: expected exactly one"
        )


def _check_execution(cfg: RunConfig) -> None:
    if cfg.tokenizer is not None and cfg.tokens == "model":
        raise ConfigError(f"tokenizer={cfg.tokenizer} contradicts tokens=model, whose texts are tokens of that model: "
                          "expected tokenizer=null, or exec=simulated")  # fmt: skip
    if cfg.exec == "distributed":
        _check_distributed(cfg)
        return
    if not is_a(cfg.transport, "InProcess"):
        transport = _word(cfg.transport, TRANSPORTS)
        raise ConfigError(f"transport={transport} contradicts exec={cfg.exec}: expected transport=in_process")
    real = cfg.tokens == "model"
    if real != (cfg.exec == "emulated"):
        allowed = "tokens=model" if cfg.exec == "emulated" else "tokens=hash or tokens=workload"
        raise ConfigError(f"tokens={cfg.tokens} contradicts exec={cfg.exec}: expected {allowed}")
    if cfg.exec == "simulated" and cfg.step_time != "model":
        raise ConfigError("step_time=measured contradicts exec=simulated: expected step_time=model")
    if cfg.macro_steps and cfg.exec == "emulated":
        raise ConfigError("macro_steps=true contradicts exec=emulated: a real model computes every step")


def _check_distributed(cfg: RunConfig) -> None:
    transport, word = node_class(cfg.transport), _word(cfg.transport, TRANSPORTS)
    if transport.within_process:
        raise ConfigError(f"transport={word} contradicts exec=distributed: expected gloo, nccl or mapped")
    if cfg.tokens == "workload":
        raise ConfigError("tokens=workload contradicts exec=distributed: expected tokens=model or tokens=hash")
    if cfg.step_time != "measured":
        raise ConfigError(f"step_time={cfg.step_time} contradicts exec=distributed: its time is the machine's")
    if cfg.macro_steps:
        raise ConfigError("macro_steps=true contradicts exec=distributed: every step is computed")
    if transport.needs_gpu and not keeps_kv_on_gpu(cfg):
        raise ConfigError(f"transport={word} contradicts KV in host memory: expected model.device=cuda, or "
                          "transport=gloo")  # fmt: skip
    if transport.within_host and keeps_kv_on_gpu(cfg) and not cfg.model.device.startswith("cuda"):
        raise ConfigError(f"transport={word} contradicts model.device={cfg.model.device}: expected cpu or cuda")


def keeps_kv_on_gpu(cfg: RunConfig) -> bool:
    """Whether blocks in HBM are memory of a GPU."""
    return cfg.tokens == "model" and cfg.model.device != "cpu"


def _check_fetch(cfg: RunConfig) -> None:
    """Fetching takes somebody else who is known to have more of a prompt than the instance that a request goes to."""
    mode, roles = class_name(cfg.mode), list(cfg.cluster.roles)
    if is_a(cfg.fetch, "NeverFetch"):
        return
    fetch = f"fetch={_word(cfg.fetch, FETCHES)}"
    never = "fetch=never" if Role.STORE not in roles else "fetch=never and no store among the roles"
    if is_a(cfg.index, "NullIndex"):
        raise ConfigError(f"{fetch} contradicts index=none: nobody holds anything; expected {never}")
    if is_a(cfg.index_source, "NoPromptTree"):
        raise ConfigError(f"{fetch} contradicts index_source=none: nobody knows who holds what; expected {never}")
    if mode == "PDBasic":
        raise ConfigError(f"{fetch} contradicts mode=pd_basic: nobody holds anything; expected {never}")
    decode_holds = mode != "PDCaching1" and Role.DECODE.value in roles
    more_may_come = not is_a(cfg.scaling, "NoScaling")
    if not (decode_holds or more_may_come) and sum(role != Role.DECODE.value for role in roles) < 2:
        raise ConfigError(f"{fetch} contradicts cluster.roles={roles}: no other instance caches; expected {never}")


def _word(node: Any, words: Mapping[str, str]) -> str:
    """By what a node is chosen: the word of its class, or the name of one that has none."""
    return words.get(class_name(node), class_name(node))
