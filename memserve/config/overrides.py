"""Overrides: the words of a command line before Hydra reads them, as text. Knows the schema; composes nothing."""

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from memserve.config.errors import ConfigError
from memserve.config.schema import RunConfig

SEARCH = "hydra.searchpath"  # where Hydra looks for words beside our own directory
_FLAGS = ("--config-dir", "-cd")  # Hydra's, which no other process than the one that it is given to would read

_NO_WORD = re.compile(r"null|true|false|[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)  # in Hydra's grammar


def check_kinds(words: Sequence[str], directory: Path) -> None:
    """Raises ConfigError for what Hydra refuses, but not by what is expected: an option that its section does not have;
    no word for a group, or a number; a list for a section or a mapping; a mapping for a list. directory: of the YAML
    files.
    """
    for word in words:
        name, _, value = word.lstrip("+").partition("=")
        _check_name(name)
        group = name.partition("@")[0]
        if any(map(_NO_WORD.fullmatch, value.strip("[]").split(","))) and group in _groups(directory):
            said = ", ".join(sorted(path.stem for path in (directory / group).glob("*.yaml")))
            raise ConfigError(f"{word}: expected a word of its group, {said}")
        kind = _type_of(name)
        if value.startswith("[") and isinstance(kind, type) and is_dataclass(kind):
            raise ConfigError(f"{word}: expected {options_of(name, kind)}")
        plain = {get_origin(one) for one in (kind, *get_args(kind))}
        for opening, other, expected in (("[", dict, "a mapping"), ("{", list, "a list")):
            if value.startswith(opening) and other in plain:
                raise ConfigError(f"{word}: expected {expected}")


def _check_name(name: str) -> None:
    section, _, option = name.rpartition(".")
    kind = _type_of(section) if section else None
    if is_dataclass(kind) and option not in (known := [one.name for one in fields(kind)]):
        raise ConfigError(f"{name}: no such option; expected one of {', '.join(known)}")


@cache
def _groups(directory: Path) -> frozenset[str]:
    """What words are chosen by, workload/arrivals for one. Looked for once: every number that is given asks."""
    return frozenset(str(path.relative_to(directory)) for path in directory.glob("**/"))


def _type_of(name: str) -> Any:
    """What the schema has for an option, or None."""
    kind: Any = RunConfig
    for part in name.split("."):
        kind = {option.name: option.type for option in fields(kind)}.get(part) if is_dataclass(kind) else None
    return kind


def options_of(name: str, section: type) -> str:
    """What is expected of a section."""
    return f"a value of one of its options, {', '.join(f'{name}.{option.name}' for option in fields(section))}"


def with_search(words: Sequence[str]) -> list[str]:
    """The same words with a directory of one's own (--config-dir DIR) named by a word, which every process of a sweep
    or a cluster is given. Raises ConfigError where it is none, or where such a word names others.
    """
    rest, directories = list[str](), list[str]()
    following = iter(words)
    for word in following:
        flag, has_value, value = word.partition("=")
        if flag in _FLAGS:
            directories.append(value if has_value else next(following, ""))
        else:
            rest.append(word)
    if not directories:
        return rest
    *others, directory = directories
    named = next((word for word in rest if word.startswith(f"{SEARCH}=")), None) or " ".join(others)
    if named:
        raise ConfigError(f"--config-dir {directory} beside {named}: expected one of them")
    if not directory or not Path(directory).is_dir():
        raise ConfigError(f"--config-dir {directory}: expected a directory, with one for each group in it")
    return [*rest, f"{SEARCH}=[{quoted(f'file://{Path(directory).resolve()}')}]"]


def of_configuration(words: Sequence[str]) -> list[str]:
    """Those that say what runs, and none that says where it is written."""
    return [word for word in words if not word.startswith("hydra.") or word.startswith(f"{SEARCH}=")]


def quoted(text: str) -> str:
    """Text as a word's value, as it is: Hydra reads "=", "," and more in a bare one."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + match[2].replace("'", "\\'"), text)
    return f"'{escaped}'"
