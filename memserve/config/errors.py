"""Errors of a configuration, and what every check of one needs."""

from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be run as asked."""


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name}={value!r}: expected {allowed}")


def class_name(node: Any) -> str:
    """The name of the class that a node describes."""
    return str(node.get("_target_", "")).rpartition(".")[2]
