"""Weights of a model are loaded once for all cases of a test module that builds engines again and again."""

from contextlib import contextmanager

import pytest

from memserve.cluster.engine import build_engine


@contextmanager
def weights_loaded_once(module):
    """Whoever builds an engine through `module` gets one with the same Llama object for the same model."""
    engines = {}

    def build_once(cfg):
        key = (cfg.model.path, cfg.model.dtype)
        if key not in engines:
            engines[key] = build_engine(cfg)
        return engines[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build_engine", build_once)
        yield
