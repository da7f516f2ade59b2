"""Errors of a configuration, and what every check of one needs."""

import importlib
import inspect
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be run as asked."""


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name}={value!r}: expected {allowed}")


def class_name(node: Any) -> str:
    """The name of the class that a node describes."""
    return str(node.get("_target_", "")).rpartition(".")[2]


def is_a(node: Any, name: str) -> bool:
    """Whether a node describes our class of that name, or one derived from it; the node is checked to describe one."""
    module, _, own_name = str(node["_target_"]).rpartition(".")
    bases = inspect.getmro(getattr(importlib.import_module(module), own_name))
    return any(base.__name__ == name and base.__module__.startswith("memserve.") for base in bases)
