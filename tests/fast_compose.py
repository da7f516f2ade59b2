"""Hydra's `compose` for a process that asks for thousands of configurations, of which most differ in values alone.

What the words of groups compose is Hydra's, and kept, for all processes of a test run (COMPOSED): of words that change
different parts of a configuration, each word's by itself, since tests put few of them together in many ways. Values are
then applied as Hydra applies them, by its own function. Files and words are read once, and what Hydra notes for each
default in case another one names it (`${..}`, which none of ours does) is left out. Errors are Hydra's own.
`test_fast_compose.py` holds one against the other.
"""

import copy
import functools
import hashlib
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from hydra import compose
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from memserve.compose import config_dir

COMPOSED = "COMPOSED_BY_TESTS"  # a directory where processes of one test run find what another has composed
_PLAIN = re.compile(r"\w+=\w+")


@functools.cache
def _parsed(word: str) -> Override:
    return OverridesParser.create().parse_override(word)


def _chooses(override: Override) -> bool:
    """Whether a word names a group's word, rather than a value."""
    return override.package is not None or (config_dir() / override.key_or_group).is_dir()


_load = FileConfigSource.load_config


@functools.cache
def _loaded(path: str, config_path: str) -> bytes:
    return pickle.dumps(_load(FileConfigSource("main", path), config_path))


def _read_once(source: FileConfigSource, config_path: str) -> object:
    result = pickle.loads(_loaded(source.path, config_path))
    result.provider = source.provider
    return result


@contextmanager
def _made_fast() -> Iterator[None]:
    before = defaults_list._create_interpolation_map
    none_known = OmegaConf.create()
    defaults_list._create_interpolation_map = lambda *arguments: none_known
    FileConfigSource.load_config = _read_once
    try:
        yield
    finally:
        defaults_list._create_interpolation_map, FileConfigSource.load_config = before, _load


@functools.cache
def _of_hydra(words: tuple[str, ...]) -> DictConfig:
    path = Path(os.environ[COMPOSED]) / hashlib.sha256("\n".join(words).encode()).hexdigest()
    if not path.exists():
        with _made_fast():
            composed = compose("run", overrides=list(words))
        own = path.with_suffix(f".{os.getpid()}")
        own.write_bytes(pickle.dumps(composed))
        own.replace(path)  # whole, or not there
    return cast(DictConfig, pickle.loads(path.read_bytes()))


@functools.cache
def _changed(word: str) -> frozenset[str] | None:
    """The parts of a configuration that a word of a group decides: its group's, be it the default, and what else it
    changes. None where it adds or removes one.
    """
    before, after = (OmegaConf.to_container(_of_hydra(words)) for words in ((), (word,)))
    if before.keys() != after.keys():
        return None
    own = word.partition("=")[0]
    return frozenset(name for name in before if before[name] != after[name] or name == own)


@functools.cache
def _of_words(words: tuple[str, ...]) -> DictConfig:
    """What they compose together: put together of what each does alone, where no part is changed by two."""
    if not all(_PLAIN.fullmatch(word) for word in words):
        return _of_hydra(words)
    words = tuple({word.partition("=")[0]: word for word in words}.values())  # of a group's the last counts
    changes = [_changed(word) for word in words]
    if None in changes or len(frozenset().union(*changes)) < sum(map(len, changes)):
        return _of_hydra(words)
    cfg = copy.deepcopy(_of_hydra(()))
    with open_dict(cfg):
        for word, names in zip(words, changes, strict=True):
            for name in names:
                cfg[name] = copy.deepcopy(_of_hydra((word,))._get_node(name))
    return cfg


def compose_fast(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """As `hydra.compose` of configs/run.yaml, inside an initialized Hydra."""
    assert config_name == "run"
    try:
        parsed = [_parsed(word) for word in overrides]
        cfg = copy.deepcopy(_of_words(tuple(p.input_line for p in parsed if _chooses(p))))
        ConfigLoaderImpl._apply_overrides_to_config([p for p in parsed if not _chooses(p)], cfg)
    except (HydraException, OmegaConfBaseException, ValueError):
        return compose(config_name, overrides=list(overrides))
    return cfg
