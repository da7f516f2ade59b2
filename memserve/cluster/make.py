"""make: the object that a node of the configuration describes, by Hydra's `instantiate`."""

import functools
import inspect
import json
from collections.abc import Callable, Collection
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from memserve.config.errors import ConfigError


def make(node: Any, **arguments: Any) -> Any:
    """The object of a `_target_` node. Raises ConfigError with what its class says of a bad argument."""
    try:
        return maker(node)(**arguments)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(str(error)) from error


def make_asking(node: Any, **offers: Any) -> Any:
    """As `make`, given those of `offers` (costs=, store=, ..) that its class asks for."""
    return make(node, **{name: offer for name, offer in offers.items() if asks(node, name)})


def asks(node: Any, name: str) -> bool:
    """Whether its class takes an argument of that name."""
    return name in _arguments(maker(node).func)


@functools.cache
def _arguments(kind: Callable[..., Any]) -> Collection[str]:
    return inspect.signature(kind).parameters.keys()


def maker(node: Any) -> functools.partial[Any]:
    """What makes it from the arguments that are still missing."""
    described = json.dumps(node)
    try:
        has_nodes_within = described.count('"_target_"') > 1  # of which each object has its own
        return _found(described) if has_nodes_within else _remembered(described)
    except InstantiationException as error:
        raise ConfigError(str(error.__cause__ or error)) from error


def _found(described: str) -> functools.partial[Any]:
    found = instantiate(json.loads(described), _partial_=True)
    # Hydra's partial looks at its policy anew whenever it is called, which takes longer than most of our objects.
    return functools.partial(found.func, *found.args, **found.keywords)


_remembered = functools.cache(_found)  # a large cluster's instances are thousands of objects, of some twenty nodes
