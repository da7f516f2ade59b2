"""Options of a configuration that has been made read-only, found as attributes of plain objects are.

OmegaConf asks flags, types and interpolations of each option whenever it is read, which takes a cluster of tests' size
as long to be built as to answer. Whatever may be written to (a copy, too) is not touched.
"""

from omegaconf import DictConfig

from memserve import compose

_resolve = compose.resolve


def resolve_fast(composed: DictConfig) -> DictConfig:
    """As `memserve.compose.resolve`."""
    cfg = _resolve(composed)
    _remember(cfg)
    return cfg


def _remember(node: DictConfig) -> None:
    for name in node:
        value = node[name]
        if not hasattr(DictConfig, name):
            vars(node)[name] = value
        if isinstance(value, DictConfig):
            _remember(value)
