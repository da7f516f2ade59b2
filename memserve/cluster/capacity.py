"""Capacity: what an instance's blocks hold, how many there are, and which requests they can serve at all."""

from collections.abc import Collection

from memserve.cluster.costs import geometry_of_model
from memserve.config.errors import ConfigError
from memserve.config.per_role import num_ranks, of_role
from memserve.config.schema import RunConfig
from memserve.config.sizes import parse_bytes
from memserve.hash_runner import hash_geometry
from memserve.kvcache.layout import CacheGeometry, what_fits
from memserve.model.llama import Llama
from memserve.request import Role
from memserve.sched.admission import Limits
from memserve.sched.cost_model.base import CostModel


def rank_geometry(cfg: RunConfig, model: Llama | None, role: str) -> CacheGeometry:
    """What a block holds on one rank of a role's instances. model: what runs, or None."""
    return geometry_of_model(cfg, model, num_ranks(cfg, role)) or hash_geometry(cfg.kvcache.block_size)


def capacity(cfg: RunConfig, geometry: CacheGeometry) -> tuple[int, int]:
    """Blocks in HBM and in DRAM. cfg: `of_role`. Raises ConfigError for bytes that hold not even one block."""
    kv = cfg.kvcache
    counts = [kv.num_hbm_blocks or 0, kv.num_dram_blocks]
    for i, (name, value) in enumerate((("hbm_bytes", kv.hbm_bytes), ("dram_bytes", kv.dram_bytes))):
        if value is not None:
            counts[i] = parse_bytes(value) // geometry.block_bytes
            if not counts[i]:
                raise ConfigError(
                    f"kvcache.{name}={value}: expected at least the {geometry.block_bytes} bytes of one block"
                )
    return counts[0], counts[1]


def check_fits(costs: CostModel, pool_bytes: int) -> None:
    """Raises ConfigError where the costs are of a GPU that has no room for so many bytes of blocks."""
    try:
        costs.check_pool(pool_bytes)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def describe_pools(cfg: RunConfig, roles: Collection[Role], model: Llama | None) -> str:
    """What fits into an instance's pool, in one line. roles: that there are."""
    geometries = {role: rank_geometry(cfg, model, role) for role in roles}
    fits = {role: what_fits(kv, *capacity(of_role(cfg, role), kv)) for role, kv in geometries.items()}
    texts = dict.fromkeys(fits.values())
    return " | ".join(texts if len(texts) == 1 else map(": ".join, fits.items()))


def limits_of(cfg: RunConfig, model: Llama | None, role: Role, max_context: int, vocab_size: int) -> Limits:
    """What an instance of a role can serve; where another one decodes, that has to have room for the answer."""
    roles = (role, Role.DECODE) if role is Role.PREFILL else (role,)
    num_blocks, *decode_blocks = (capacity(of_role(cfg, of), rank_geometry(cfg, model, of))[0] for of in roles)
    return Limits(max_context, vocab_size, num_blocks, cfg.kvcache.block_size, *decode_blocks)
