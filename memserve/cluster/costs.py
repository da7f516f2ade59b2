"""Costs: the cost model of a run, checked against what runs, and handed to the policies that ask for prices."""

from dataclasses import replace
from typing import Any

import torch

from memserve.cluster.make import make, make_asking
from memserve.config.errors import ConfigError
from memserve.config.per_role import num_ranks, option_of_role
from memserve.config.schema import RunConfig
from memserve.hash_runner import hash_geometry
from memserve.kvcache.layout import CacheGeometry
from memserve.metrics.output import cpu_model, usable_cpus
from memserve.model.llama import Llama
from memserve.model.model_config import ModelConfig
from memserve.model.runner import geometry
from memserve.request import TAKING, Role
from memserve.sched.cost_model.base import CostModel, Subject, attention_tokens
from memserve.sched.prediction import Prediction
from memserve.values import wrong_return

SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
)  # fmt: skip


def costs_of(cfg: RunConfig, role: str) -> CostModel:
    """What steps of a role's instances cost, for who compares them and runs none."""
    costs: CostModel = make_asking(option_of_role(cfg, role, "cost_model"), tensor_parallel=num_ranks(cfg, role))
    return costs


def computing_role(cfg: RunConfig, role: str) -> str:
    """Whose costs are an instance's of that role: what a store keeps is of who takes requests."""
    return role if role != Role.STORE else next(r for r in cfg.cluster.roles if r in TAKING)


def predicted(cfg: RunConfig, exact: CostModel) -> CostModel:
    """What those are given who decide by a cost model, in the place of the one that time goes by.

    Raises ValueError where the prediction makes none.
    """
    prediction: Prediction = make_asking(cfg.prediction, seed=cfg.seed)
    costs = prediction.costs(exact)
    if not isinstance(costs, CostModel):
        raise wrong_return(prediction, "costs", costs, "a CostModel")
    return costs


def build_cost_model(cfg: RunConfig, model: Llama | None, role: str = Role.COLOCATED) -> CostModel:
    """The cost model of a role's instances. model: what computes here; None where nothing does.

    Raises ConfigError for costs of another machine or model, and for those without a price of swaps.
    """
    costs = costs_of(cfg, role)
    costs.block_size = cfg.kvcache.block_size
    config = None if model is None else model.whole_config
    counts_as = geometry_of_model(cfg, config, num_ranks(cfg, role)) or hash_geometry(cfg.kvcache.block_size)
    costs.pieces_per_block = make(cfg.layout).regions_per_block(counts_as)
    if not hasattr(costs, "swap_block_s"):
        name = type(costs).__name__
        raise ConfigError(f"cost_model={name} has no swap_block_s: expected seconds of a block between HBM and DRAM")
    try:
        costs.check(subject_of(cfg, model, num_ranks(cfg, role)))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return costs


def subject_of(cfg: RunConfig, model: Llama | None, num_ranks: int = 1) -> Subject:
    """This machine, and the model on it; of a simulation, whose KV its blocks hold on each of num_ranks ranks."""
    num_ranks = num_ranks if model is None else model.shard.size
    cuda = model is not None and model.device.type == "cuda"
    machine = torch.cuda.get_device_name(model.device) if model is not None and cuda else cpu_model()
    config = None if model is None else model.whole_config
    place, kv = (machine, usable_cpus() or 0, torch.get_num_threads()), kv_of(geometry_of_model(cfg, config, num_ranks))
    if model is None:
        return Subject(*place, tensor_parallel=num_ranks, kv=kv)
    return Subject(*place, shape_of(model.config), cfg.model.dtype, cfg.model.attention, num_ranks, kv)


def geometry_of_model(cfg: RunConfig, config: ModelConfig | None, num_ranks: int = 1) -> CacheGeometry | None:
    """What blocks hold, on one of num_ranks ranks, of the model that runs or of the one that a simulation is of; None
    where there is neither. config: of all of the model that runs.
    """
    simulated, size = cfg.geometry, cfg.kvcache.block_size
    if simulated is not None:
        dtype, num_heads = getattr(torch, simulated.dtype), simulated.num_kv_heads
        whole = CacheGeometry(simulated.num_layers, size, num_heads, simulated.head_dim, dtype)
    elif config is not None:
        whole, num_heads = geometry(config, size, getattr(torch, cfg.model.dtype)), config.num_kv_heads
    else:
        return None
    return replace(whole, num_kv_heads=num_heads // num_ranks)


def shape_of(config: ModelConfig) -> dict[str, int]:
    """The sizes that a step's time depends on, by name; of a model split over ranks, this rank's."""
    return {name: getattr(config, name) for name in SHAPE}


def kv_of(of: CacheGeometry | None) -> dict[str, int]:
    """What a token's KV is, on one rank; empty where it is no model's."""
    if of is None:
        return {}
    sizes = {"num_layers": of.num_layers, "num_kv_heads": of.num_kv_heads, "head_dim": of.head_dim}
    return {**sizes, "bytes_per_element": of.dtype.itemsize}


def price_of_attention(node: Any, costs: CostModel) -> dict[str, float]:
    """What an eviction order that leaves `attention_tokens` null is told of the cost model.

    Raises ConfigError where the cost model has no answer.
    """
    if node.get("attention_tokens", 0) is not None:
        return {}
    tokens = attention_tokens(costs)
    if tokens == float("inf"):
        raise ConfigError(
            "eviction.attention_tokens=null with a cost model in which a token costs the same at every position: "
            "expected another cost_model, or eviction.attention_tokens above 0"
        )
    return {"attention_tokens": tokens}
