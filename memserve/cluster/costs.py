"""Costs: the cost model of a run, checked against what runs, and handed to the policies that ask for prices."""

from typing import Any

import torch

from memserve.cluster.make import make
from memserve.config.errors import ConfigError
from memserve.config.schema import RunConfig
from memserve.kvcache.layout import CacheGeometry
from memserve.metrics.output import cpu_model, usable_cpus
from memserve.model.llama import Llama
from memserve.model.model_config import ModelConfig
from memserve.model.runner import geometry
from memserve.sched.cost_model.base import CostModel, Subject, attention_tokens

SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
)  # fmt: skip


def build_cost_model(cfg: RunConfig, model: Llama | None) -> CostModel:
    """The run's cost model. model: what computes here; None where nothing does.

    Raises ConfigError for costs of another machine or model, and for those without a price of swaps.
    """
    costs: CostModel = make(cfg.cost_model)
    costs.block_size = cfg.kvcache.block_size
    if not hasattr(costs, "swap_block_s"):
        name = type(costs).__name__
        raise ConfigError(f"cost_model={name} has no swap_block_s: expected seconds of a block between HBM and DRAM")
    try:
        costs.check(subject_of(cfg, model))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return costs


def subject_of(cfg: RunConfig, model: Llama | None) -> Subject:
    """This machine, and the model on it; of a simulation, whose KV its blocks hold."""
    cuda = model is not None and model.device.type == "cuda"
    machine = torch.cuda.get_device_name(model.device) if model is not None and cuda else cpu_model()
    place, kv = (machine, usable_cpus() or 0, torch.get_num_threads()), kv_of(geometry_of_model(cfg, model))
    if model is None:
        return Subject(*place, kv=kv)
    return Subject(*place, shape_of(model.config), cfg.model.dtype, cfg.model.attention, model.shard.size, kv)


def geometry_of_model(cfg: RunConfig, model: Llama | None) -> CacheGeometry | None:
    """What blocks hold of the model that runs, or of the one that a simulation is of; None where there is neither."""
    simulated, size = cfg.geometry, cfg.kvcache.block_size
    if simulated is not None:
        dtype = getattr(torch, simulated.dtype)
        return CacheGeometry(simulated.num_layers, size, simulated.num_kv_heads, simulated.head_dim, dtype)
    return None if model is None else geometry(model.config, size, model.dtype)


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
