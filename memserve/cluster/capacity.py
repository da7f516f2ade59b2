"""Capacity: what an instance's blocks hold, how many there are, and which requests they can serve at all.

In a simulation that is told a geometry two things differ: what a block counts as, in pools, on links and in reports,
which is that model's KV (`rank_geometry`), and what is stored of it (`stored_geometry`): nothing with tokens=workload,
and with tokens=hash HashRunner's 8 bytes in place of the keys, or values, of a token in a layer.
"""

from collections.abc import Collection
from dataclasses import replace

from memserve.cluster.costs import geometry_of_model
from memserve.config.errors import ConfigError
from memserve.config.per_role import num_ranks, option_of_role
from memserve.config.schema import RunConfig
from memserve.config.sizes import parse_bytes
from memserve.hash_runner import hash_geometry
from memserve.kvcache.layout import CacheGeometry, what_fits
from memserve.model.model_config import ModelConfig
from memserve.request import Role
from memserve.sched.admission import Limits
from memserve.sched.cost_model.base import CostModel


def rank_geometry(cfg: RunConfig, config: ModelConfig | None, role: str) -> CacheGeometry:
    """What a block holds on one rank of a role's instances. config: of all of the model that runs, or None."""
    return geometry_of_model(cfg, config, num_ranks(cfg, role)) or hash_geometry(cfg.kvcache.block_size)


def stored_geometry(cfg: RunConfig, config: ModelConfig | None, role: str) -> CacheGeometry:
    """What an arena has for a block on one rank: as many layers as that counts as, so that all regions are there."""
    counts_as = rank_geometry(cfg, config, role)
    own = hash_geometry(cfg.kvcache.block_size)
    return counts_as if cfg.tokens == "model" else replace(own, num_layers=counts_as.num_layers)


def bytes_per_stored(cfg: RunConfig) -> int:
    """What each byte that a simulation stores counts as. Raises ConfigError where that is no whole number."""
    if cfg.tokens == "model" or cfg.geometry is None:
        return 1
    counts_as, stored = (
        of(cfg, None, cfg.cluster.roles[0]).layer_block_bytes for of in (rank_geometry, stored_geometry)
    )
    if cfg.tokens == "hash" and counts_as % stored:
        size = cfg.kvcache.block_size
        raise ConfigError(f"geometry with {counts_as // size} bytes of keys a token and layer contradicts tokens=hash: "
                          f"expected a multiple of the {stored // size} that stand for them")  # fmt: skip
    return counts_as // stored


def capacity(cfg: RunConfig, role: str, geometry: CacheGeometry) -> tuple[int, int]:
    """Blocks of a role's instance in HBM, of which a store has none, and in DRAM. geometry: of a rank.

    Raises ConfigError for bytes that hold not even one block.
    """
    kv = option_of_role(cfg, role, "kvcache")
    counts = [kv.num_hbm_blocks or 0, kv.num_dram_blocks]
    for i, (name, value) in enumerate((("hbm_bytes", kv.hbm_bytes), ("dram_bytes", kv.dram_bytes))):
        if value is not None:
            counts[i] = parse_bytes(value) // geometry.block_bytes
            if not counts[i]:
                of = f"per_role.{role}." if name in getattr(cfg.per_role, role).get("kvcache", {}) else ""
                raise ConfigError(
                    f"{of}kvcache.{name}={value}: expected at least the {geometry.block_bytes} bytes of one block"
                )
    return counts[0] if role != Role.STORE else 0, counts[1]


def check_fits(costs: CostModel, pool_bytes: int) -> None:
    """Raises ConfigError where the costs are of a GPU that has no room for so many bytes of blocks."""
    try:
        costs.check_pool(pool_bytes)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def describe_pools(cfg: RunConfig, roles: Collection[Role], config: ModelConfig | None) -> str:
    """What fits into an instance's pool, in one line. roles: that there are."""
    geometries = {role: rank_geometry(cfg, config, role) for role in roles}
    fits = {role: what_fits(kv, *capacity(cfg, role, kv)) for role, kv in geometries.items()}
    texts = dict.fromkeys(fits.values())
    return " | ".join(texts if len(texts) == 1 else map(": ".join, fits.items()))


def describe_moved(cfg: RunConfig) -> str:
    """What is moved for a token of KV, in one line; "" where it is what the model that runs has."""
    if cfg.exec != "simulated":
        return ""
    geometry = replace(rank_geometry(cfg, None, cfg.cluster.roles[0]), block_size=1)
    ranks = num_ranks(cfg, cfg.cluster.roles[0])
    size = f"{ranks * geometry.block_bytes:,} bytes in {geometry.num_layers} layers"
    if cfg.geometry is not None:
        return f"{size}, by geometry"
    return f"{size}, which is HashRunner's own and no model's: geometry=llama3_8b, say, makes it that model's"


def limits_of(cfg: RunConfig, config: ModelConfig | None, role: Role, max_context: int, vocab_size: int) -> Limits:
    """What an instance of a role can serve; where another one decodes, that has to have room for the answer."""
    roles = (role, Role.DECODE) if role is Role.PREFILL else (role,)
    num_blocks, *decode_blocks = (capacity(cfg, of, rank_geometry(cfg, config, of))[0] for of in roles)
    return Limits(max_context, vocab_size, num_blocks, cfg.kvcache.block_size, *decode_blocks)
