"""The scripts as modules, which import each other by name as they do when they are run."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from scripts.test_profile_cost_model import SMALLEST


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """script(name): the module scripts/name.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return importlib.import_module


@pytest.fixture
def costs(script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of profile_cost_model.py, of a tiny model."""
    path = tmp_path / "costs.json"
    words = ["--out", str(path), "model=tiny", "model.num_threads=1", *SMALLEST]
    monkeypatch.setattr(sys, "argv", ["profile_cost_model.py", *words])
    script("profile_cost_model").main()
    return str(path)
