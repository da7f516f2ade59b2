"""Hydra's `compose` for a process that asks for thousands of configurations, of which most differ in values alone.

What the words of groups compose is Hydra's, and kept; values are then applied as Hydra applies them, by its own
function. Files and words are read once, and what Hydra notes for each default in case another one names it (`${..}`,
which none of ours does) is left out. Errors are Hydra's own. `test_fast_compose.py` holds one against the other.
"""

import copy
import functools
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra import compose
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from memserve.compose import config_dir

_composed: dict[tuple[str, ...], DictConfig] = {}


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


def compose_fast(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """As `hydra.compose`, inside an initialized Hydra."""
    try:
        parsed = [_parsed(word) for word in overrides]
        groups = tuple(p.input_line for p in parsed if _chooses(p))
        if groups not in _composed:
            with _made_fast():
                _composed[groups] = compose(config_name, overrides=list(groups))
        cfg = copy.deepcopy(_composed[groups])
        ConfigLoaderImpl._apply_overrides_to_config([p for p in parsed if not _chooses(p)], cfg)
    except (HydraException, OmegaConfBaseException, ValueError):
        return compose(config_name, overrides=list(overrides))
    return cfg
