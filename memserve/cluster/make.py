"""make: the object that a node of the configuration describes.

Not Hydra's `instantiate`, which asks its security policy and merges nodes anew for each object: an instance has some
thirty of them, and a simulated cluster hundreds of instances. What a node may say was checked when it was composed.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from omegaconf import OmegaConf

from memserve.config.checks import ConfigError
from memserve.config.targets import target_of


def make(node: Any, **arguments: Any) -> Any:
    """The object that a `_target_` node describes, with `arguments` over the node's own; nodes in it are objects too.

    Raises ConfigError with what its class says of a bad argument.
    """
    try:
        return maker(node, **arguments)()
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(str(error)) from error


def maker(node: Any, **arguments: Any) -> partial[Any]:
    """What makes that object from the arguments that are still missing."""
    described: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    given = {name: _made(value) for name, value in {**described, **arguments}.items() if name != "_target_"}
    return partial(target_of(described), **given)


def _made(value: Any) -> Any:
    return maker(value)() if isinstance(value, Mapping) and "_target_" in value else value
