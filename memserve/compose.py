"""Compose: from words on a command line to a checked, read-only RunConfig. Knows Hydra; builds nothing.

`load_config(["index=none", "workload.rate=2"])` is what `scripts/run.py index=none workload.rate=2` runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException, OverrideParseException
from omegaconf import BooleanNode, DictConfig, FloatNode, IntegerNode, ListConfig, OmegaConf, StringNode
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from memserve.config.checks import check_config
from memserve.config.checks_of_prediction import check_prediction
from memserve.config.checks_of_store import check_store
from memserve.config.errors import ConfigError
from memserve.config.overrides import check_kinds, options_of, quoted
from memserve.config.per_role import of_role
from memserve.config.schema import RunConfig
from memserve.config.targets import check_target
from memserve.kvcache.eviction import Eviction
from memserve.kvcache.granularity import Granularity
from memserve.kvcache.index import Index
from memserve.kvcache.layout import Layout
from memserve.metrics.tracking import Tracking
from memserve.model.attention import attention_backend
from memserve.sched.batching import Batching
from memserve.sched.cost_model.base import CostModel
from memserve.sched.departures import Departure
from memserve.sched.fetch_policy import FetchPolicy
from memserve.sched.heirs import Heir
from memserve.sched.migration import MigrationPolicy
from memserve.sched.modes import Mode
from memserve.sched.prediction import Prediction
from memserve.sched.preemption import Preemption
from memserve.sched.prompt_tree import PromptIndex
from memserve.sched.queue_policy import QueuePolicy
from memserve.sched.rebalancing import Rebalancing
from memserve.sched.rejection import Rejection
from memserve.sched.routing import Policy
from memserve.sched.scaling import Scaling
from memserve.sched.store_policy import StorePolicy
from memserve.sched.swap_policy import SwapPolicy
from memserve.transfer.link import LinkModel
from memserve.transfer.transport import Transport
from memserve.workload.session import Workload

TARGETS: dict[str, type[object]] = {  # what the object of each node must be
    "mode": Mode,
    "policy": Policy,
    "decode_policy": Policy,
    "index": Index,
    "index_source": PromptIndex,
    "eviction": Eviction,
    "queue": QueuePolicy,
    "batching": Batching,
    "preemption": Preemption,
    "swap": SwapPolicy,
    "fetch": FetchPolicy,
    "store": StorePolicy,
    "layout": Layout,
    "granularity": Granularity,
    "link": LinkModel,
    "transport": Transport,
    "cost_model": CostModel,
    "prediction": Prediction,
    "scaling": Scaling,
    "heir": Heir,
    "departure": Departure,
    "rebalancing": Rebalancing,
    "migration": MigrationPolicy,
    "rejection": Rejection,
    "workload": Workload,
    "tracking": Tracking,
}
GIVEN = {  # arguments of such an object that cluster/ gives, and which are therefore no options
    "index": ("block_size", "refcounts", "num_hbm_blocks", "eviction"),
    "index_source": ("num_rows", "block_size"),
    "swap": ("costs", "block_size"),
    "granularity": ("layout", "geometry", "num_ranks"),
    "transport": ("store", "host", "gpu", "link"),
    "policy": ("cost_model",),
    "decode_policy": ("cost_model",),
    "rejection": ("cost_model", "objectives"),
    "cost_model": ("tensor_parallel",),
    "prediction": ("seed",),
}
_PLAIN: dict[type, str] = {
    IntegerNode: "an integer",
    FloatNode: "a number",
    BooleanNode: "true or false",
    StringNode: "text",
    ListConfig: "a list",
    DictConfig: "a mapping",
}
FILLED_IN = ("index_source.max_blocks", "eviction.attention_tokens")  # null until cluster/ knows the pool and the costs


def config_dir() -> Path:
    """The directory of the YAML files: in a checkout beside the package, in an installed package inside it."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "configs", package.parent / "configs"):
        if (candidate / "run.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"configs/run.yaml: expected beside or inside {package}")


def load_config(overrides: Sequence[str] = ()) -> RunConfig:
    """Composes configs/run.yaml with `overrides`, checks it, and returns it read-only: `cfg.kvcache.block_size`, and of
    what a word of a group names a plain dict, `cfg.policy["_target_"]`.

    Raises ConfigError naming the option, its value and what is allowed.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides!r}: expected a list of strings")
    check_kinds(overrides, config_dir())
    try:
        with _hydra_apart():
            composed = compose("run", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_of_hydra(error)) from error
    except ValueError as error:  # of a group's word that is none, and Hydra does not say which
        raise ConfigError(f"{' '.join(overrides)}: {error}") from error
    return resolve(composed)


def words_of(option: str, value: Any) -> list[str]:
    """The overrides that set an option; a class of one's own comes without the options of the one it replaces."""
    if isinstance(value, Mapping):
        return [f"~{option}", f"+{option}={_word(value)}"]
    return [f"{option}={_word(value)}"]


def _word(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_word(item)}" for key, item in value.items()) + "}"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return quoted(value)
    return str(value)


def group_of(name: str) -> str:
    """By what a node of the configuration is chosen on a command line."""
    return "policy@decode_policy" if name == "decode_policy" else name


@contextmanager
def _hydra_apart() -> Iterator[None]:
    """Our configuration directory is Hydra's; a Hydra in which the caller runs is as it was, afterwards."""
    callers, name = GlobalHydra.instance().hydra, JobRuntime.instance().get("name")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = callers
        JobRuntime.instance().set("name", name)


def resolve(composed: DictConfig) -> RunConfig:
    """Checks a composed configuration against the schema and the cross-field rules; returns it read-only."""
    try:
        _check_sections(RunConfig, composed)
        merged = cast(DictConfig, OmegaConf.merge(_schema(), composed))
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_refusal(error)) from error
    missing = OmegaConf.missing_keys(merged)
    if missing:
        raise ConfigError(f"{', '.join(sorted(missing))}: expected a value")
    cfg = cast(RunConfig, OmegaConf.to_object(merged))
    _check_targets(cfg)
    check_config(cfg)
    for role in dict.fromkeys(cfg.cluster.roles):
        _check_role(cfg, role)
    check_prediction(cfg)
    check_store(cfg)
    attention = cfg.model.attention
    if attention == "auto":
        attention = _best_attention(cfg.model.device, cfg.model.dtype)
    try:
        attention_backend(attention)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return replace(cfg, model=replace(cfg.model, attention=attention))


@cache
def _schema() -> DictConfig:
    """RunConfig's, which is made once: a tenth of what a small simulation takes to be composed."""
    return cast(DictConfig, OmegaConf.structured(RunConfig))


def _check_sections(schema: type, composed: DictConfig, within: str = "") -> None:
    """Raises ConfigError where a section, of which the options have values, is given one itself."""
    for section in fields(schema):
        if not is_dataclass(section.type) or section.name not in composed:
            continue
        kind, name, value = cast(type, section.type), within + section.name, composed[section.name]
        if not isinstance(value, DictConfig):
            raise ConfigError(f"{name}={value!r}: expected {options_of(name, kind)}")
        _check_sections(kind, value, f"{name}.")


def _check_targets(cfg: RunConfig) -> None:
    """Raises ConfigError for a node that describes no object of its group's class."""
    for name, kind in TARGETS.items():
        node = getattr(cfg, name)
        if not isinstance(node, dict):
            raise ConfigError(f"{name}={node!r}: expected {group_of(name)}= and a word of its group")
        filled_in = {key for key, value in node.items() if value is None and f"{name}.{key}" in FILLED_IN}
        options = {key: value for key, value in node.items() if key not in filled_in}
        check_target(name, options, kind, GIVEN.get(name, ()), filled_in)


def _check_role(cfg: RunConfig, role: str) -> None:
    """Raises ConfigError for what is said of a role's instances alone, as of what is said of all."""
    if not getattr(cfg.per_role, role):
        return
    try:
        theirs = of_role(cfg, role)
        _check_targets(theirs)
        check_config(theirs)
    except (OmegaConfBaseException, ConfigError) as error:
        said = error if isinstance(error, ConfigError) else _refusal(error)
        raise ConfigError(f"per_role.{role}: {said}") from error


def _refusal(error: OmegaConfBaseException) -> str:
    """What the schema says of an option, in one line like those of our own checks."""
    name, node = error.full_key, error.child_node
    if type(node) in _PLAIN:
        null = "null or " if node._is_optional() else ""
        return f"{name}={error.value!r}: expected {null}{_PLAIN[type(node)]}"
    if isinstance(error, ConfigKeyError) and is_dataclass(error.object_type):
        return f"{name}: no such option; expected one of {', '.join(f.name for f in fields(error.object_type))}"
    said = str(error).partition("\n")[0]
    return said if not name or name in said else f"{name}: {said}"


def _of_hydra(error: Exception) -> str:
    """What Hydra says, of which word, and what it has that from."""
    said = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {said.partition(chr(10))[0]}"
    return f"{said}: {str(error.__cause__).partition(chr(10))[0]}" if said.startswith("Error merging") else said


def _best_attention(device: str, dtype: str) -> str:
    """What attention=auto means."""
    if device.startswith("cuda"):
        return "triton"
    return "sparse" if (device, dtype) == ("cpu", "float32") else "sdpa"


def to_yaml(cfg: RunConfig) -> str:
    """The resolved configuration as YAML text; `load_config` of the same words gives it again."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg)))


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain dicts, lists and values."""
    return asdict(cfg)
