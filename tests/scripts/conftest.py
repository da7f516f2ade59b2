"""The scripts as modules, which import each other by name as they do when they are run."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from scripts.test_profile_cost_model import SMALLEST

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """script(name): the module scripts/name.py."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


@pytest.fixture(scope="session")
def costs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of profile_cost_model.py, of a tiny model; nobody changes it."""
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    words = ["--out", str(path), "model=tiny", "model.num_threads=1", *SMALLEST]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        patch.setattr(sys, "argv", ["profile_cost_model.py", *words])
        importlib.import_module("profile_cost_model").main()
    return str(path)
