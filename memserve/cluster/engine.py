"""Engine: what the instances of one process share, built from a RunConfig: model, tokenizer, longest context."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from memserve.config.errors import ConfigError
from memserve.config.per_role import num_ranks
from memserve.config.schema import RunConfig
from memserve.kvcache.arena import as_device
from memserve.model.byte_tokenizer import ByteTokenizer
from memserve.model.llama import Llama, load_model
from memserve.model.model_config import ModelConfig
from memserve.model.model_path import OpenedModel, open_model, open_random_model
from memserve.model.no_tokenizer import NoTokenizer
from memserve.model.parallel import WHOLE, Shard, check_divides
from memserve.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Engine:
    """What the instances of one process share. `model` is None when nothing is computed (tokens=hash, workload), and
    this rank's part where an instance has several; `config` is of all of it.
    """

    tokenizer: Tokenizer
    config: ModelConfig | None
    model: Llama | None
    vocab_size: int
    max_context: int


def build_engine(cfg: RunConfig, *, with_model: bool = True, with_weights: bool = True, shard: Shard = WHOLE) -> Engine:
    """Loads the model, or what stands in for it. Weights are loaded once, however many instances there are.

    with_model: without, only what a client and a router need to know of it.  with_weights: without, the shapes of its
    tensors alone, for who stores its KV and computes nothing.  shard: the part of it that is loaded. Raises ConfigError
    for what the model does not allow.
    """
    if cfg.model.num_threads is not None:
        torch.set_num_threads(cfg.model.num_threads)
    if cfg.tokens != "model":
        tokenizer = _tokenizer(cfg)
        return Engine(tokenizer, None, None, tokenizer.vocab_size, cfg.model.max_context or np.iinfo(np.int32).max)
    opened = _open(cfg)
    config = opened.config
    max_context = cfg.model.max_context or config.max_position
    if max_context > config.max_position:
        raise ConfigError(f"model.max_context={max_context}: the model's context has {config.max_position} tokens")
    _check_ranks(cfg, config)
    text = opened.tokenizer or NoTokenizer(config.vocab_size, config.eos_token_ids)
    if not with_model:
        return Engine(text, config, None, config.vocab_size, max_context)
    device = _device(cfg.model.device) if with_weights else torch.device("meta")
    model = load_model(config, opened.weights, getattr(torch, cfg.model.dtype), device, shard)
    if cfg.model.compile and with_weights:
        model.compile(cfg.model.fused_rows, cfg.model.early_launches)
    return Engine(text, config, model, config.vocab_size, max_context)


def _tokenizer(cfg: RunConfig) -> Tokenizer:
    """What makes tokens of texts where no model runs."""
    if cfg.tokenizer is None:
        return ByteTokenizer()
    try:
        tokenizer = open_model(cfg.tokenizer, max_context=1).tokenizer  # it runs nowhere
    except ValueError as error:
        raise ConfigError(f"tokenizer: {error}") from error
    if tokenizer is None:
        raise ConfigError(f"tokenizer={cfg.tokenizer}: that model brings none; expected one that does, or null")
    return tokenizer


def _check_ranks(cfg: RunConfig, config: ModelConfig) -> None:
    for role in sorted(set(cfg.cluster.roles)):
        try:
            check_divides(config, num_ranks(cfg, role))
        except ValueError as error:
            raise ConfigError(f"cluster.tensor_parallel.{role}: {error}") from error


def _open(cfg: RunConfig) -> OpenedModel:
    if cfg.model.path is not None:
        return open_model(cfg.model.path, cfg.seed, cfg.model.max_context)
    shape = cast(dict[str, Any], cfg.model.random)
    return open_random_model(ModelConfig.from_hf(shape, max_context=cfg.model.max_context), cfg.seed)


def _device(word: str) -> torch.device:
    try:
        device = as_device(word, "model.device")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are made on this thread's device
    return device


def eos_token_ids(engine: Engine) -> Collection[int]:
    """Tokens that end an answer: the model's, else the tokenizer's."""
    return engine.tokenizer.eos_token_ids if engine.model is None else engine.model.config.eos_token_ids
