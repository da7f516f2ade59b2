"""What tests start as processes of their own finds the packages that the tests themselves have found."""

import os
from pathlib import Path

from child_process import ROOT, own_environment, run_child


def test_a_child_imports_from_where_its_parent_was_told_to(monkeypatch, tmp_path) -> None:
    (tmp_path / "carried_along.py").write_text("print('found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_child(["-c", "import carried_along"]) == "found\n"
    assert own_environment(Path("first"))["PYTHONPATH"].split(os.pathsep) == ["first", str(ROOT), str(tmp_path)]
