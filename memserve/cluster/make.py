"""make: the object that a node of the configuration describes."""

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from memserve.config.checks import ConfigError


def make(node: Any, **arguments: Any) -> Any:
    """The object that a `_target_` node describes. Raises ConfigError with what its class says of a bad argument."""
    try:
        return instantiate(node, **arguments)
    except InstantiationException as error:
        raise ConfigError(str(error.__cause__ or error)) from error
