"""Nodes that describe an object: a `_target_` and the arguments of that class. Checks them, and builds nothing."""

import importlib
import inspect
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from memserve.config.errors import ConfigError

_PLAIN = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null"}


def check_target(
    name: str,
    node: Mapping[str, Any],
    kind: type[object] = object,
    given: Collection[str] = (),
    filled_in: Collection[str] = (),
) -> None:
    """Raises ConfigError unless node's `_target_` can be imported, is a subclass of `kind`, and takes the node's other
    keys, numbers and words of the types that it says, and needs no more. given: arguments that are no options, since
    who builds the object gives them.  filled_in: options that it gives where they are not said.
    """
    if "_target_" not in node:
        raise ConfigError(f"{name}={dict(node)}: expected a node with `_target_`")
    path = str(node["_target_"])
    target = imported_class(f"{name}._target_", path, kind)
    arguments = {str(key): value for key, value in node.items() if not str(key).startswith("_")}
    parameters = inspect.signature(target).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    hints = get_type_hints(target.__init__)
    for key, value in arguments.items():
        if key in given or (key not in parameters and not takes_all):
            takes = ", ".join(parameter for parameter in parameters if parameter not in given) or "nothing"
            raise ConfigError(f"{name}.{key}={value!r}: {path} takes {takes}{_instead(name, path)}")
        _check_type(f"{name}.{key}", value, hints.get(key))
        if isinstance(value, Mapping) and "_target_" in value:
            check_target(f"{name}.{key}", value)
    if "." not in name:  # what is within another object may get the rest from that one
        _check_all_said(name, path, parameters.values(), {*arguments, *given, *filled_in})


def _check_all_said(name: str, path: str, parameters: Iterable[inspect.Parameter], said: Collection[str]) -> None:
    """Raises ConfigError for an argument without a default that nobody gives."""
    for parameter in parameters:
        by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if by_name and parameter.default is parameter.empty and parameter.name not in said:
            raise ConfigError(f"{name}._target_={path}: expected +{name}.{parameter.name}=, which it cannot do without")


def _instead(name: str, path: str) -> str:
    """How a class that is not ours is named without the options of the one that it replaces."""
    if "." in name or path.startswith("memserve."):
        return ""
    return f"; without the options of the class that it replaces: ~{name} '+{name}={{_target_: {path}}}'"


def imported_class(name: str, path: str, kind: type[object]) -> type[Any]:
    """The class at a dotted path. Raises ConfigError unless it can be imported and is a subclass of `kind`."""
    module_name, _, attribute = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{name}={path}: cannot be imported ({error})") from error
    if not inspect.isclass(target) or not issubclass(target, kind):
        raise ConfigError(f"{name}={path}: expected a class derived from {kind.__name__}")
    return target


def node_class(node: Any) -> type[Any]:
    """The class that a node, which was checked, describes an object of."""
    return imported_class("_target_", str(node["_target_"]), object)


def is_a(node: Any, name: str) -> bool:
    """Whether a node, which was checked, describes our class of that name or one derived from it."""
    bases = inspect.getmro(node_class(node))
    return any(base.__name__ == name and base.__module__.startswith("memserve.") for base in bases)


def _check_type(name: str, value: object, hint: object) -> None:
    """Plain values only: what an object may be is its class's to say."""
    allowed = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    if not set(allowed) <= _PLAIN.keys() or type(value) in allowed or (float in allowed and type(value) is int):
        return
    raise ConfigError(f"{name}={value!r}: expected {' or '.join(_PLAIN[kind] for kind in allowed)}")
