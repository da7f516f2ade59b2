"""Compose: from words on a command line to a checked, read-only RunConfig. Knows Hydra; builds nothing.

`load_config(["index=none", "workload.rate=2"])` is what `scripts/run.py index=none workload.rate=2` runs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from memserve.config.checks import ConfigError, check_config, check_target
from memserve.config.schema import RunConfig

TARGETS = (
    "mode", "policy", "index", "eviction", "queue", "preemption", "swap", "fetch", "layout", "cost_model", "workload",
    "tracking", "granularity", "link", "decode_policy", "index_source",
)  # fmt: skip


def config_dir() -> Path:
    """The directory of the YAML files: in a checkout beside the package, in an installed package inside it."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "configs", package.parent / "configs"):
        if (candidate / "run.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"configs/run.yaml: expected beside or inside {package}")


def load_config(overrides: Sequence[str] = ()) -> RunConfig:
    """Composes configs/run.yaml with `overrides`, checks it, and returns it read-only.

    Raises ConfigError naming the option, its value and what is allowed.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides!r}: expected a list of strings")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = compose("run", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error
    return resolve(composed)


def resolve(composed: DictConfig) -> RunConfig:
    """Checks a composed configuration against the schema and the cross-field rules; returns it read-only."""
    try:
        merged = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(RunConfig), composed))
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from error
    missing = OmegaConf.missing_keys(merged)
    if missing:
        raise ConfigError(f"{', '.join(sorted(missing))}: expected a value")
    cfg = cast(RunConfig, merged)
    check_config(cfg)
    if cfg.model.attention == "auto":
        cfg.model.attention = _best_attention(cfg.model.device, cfg.model.dtype)
    for name in TARGETS:
        check_target(name, cast(dict[str, Any], OmegaConf.to_container(merged[name])))
    OmegaConf.set_readonly(merged, True)
    return cfg


def _best_attention(device: str, dtype: str) -> str:
    """What attention=auto means."""
    if device.startswith("cuda"):
        return "triton"
    return "sparse" if (device, dtype) == ("cpu", "float32") else "sdpa"


def to_yaml(cfg: RunConfig) -> str:
    """The resolved configuration as YAML text; `load_config` of the same words gives it again."""
    return OmegaConf.to_yaml(cast(DictConfig, cfg))


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain dicts, lists and values."""
    return cast(dict[str, Any], OmegaConf.to_container(cast(DictConfig, cfg)))
