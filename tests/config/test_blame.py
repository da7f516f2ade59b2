"""An error of somebody's own class says where it was; one of ours, or of what it was given, says what was wrong."""

import importlib.util
import sys

import pytest

from memserve import LocalCluster, load_config
from memserve.config.blame import told

WORDS = ["exec=simulated", "workload=synthetic", "workload.num_sessions=2", "workload.num_turns=1",
         "cluster=colocated_2"]  # fmt: skip
SOURCE = """
import numpy as np
from memserve.sched.routing import Policy

class Refuses(Policy):
    def __init__(self, alpha=1.0):
        raise ValueError("alpha must be nice")
    def choose(self, request, cluster, rng):
        return 0

class Mistaken(Policy):
    def choose(self, request, cluster, rng):
        return int((cluster.num_requests + np.zeros(7)).argmin())

class Deeper(Policy):
    def choose(self, request, cluster, rng):
        return np.stack([np.zeros(1), np.zeros(2)])

class OutOfRange(Policy):
    def choose(self, request, cluster, rng):
        return 9
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of somebody's own."""
    path = tmp_path / "of_my_own.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("of_my_own", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "of_my_own", module)
    spec.loader.exec_module(module)
    return path


def said(name):
    with pytest.raises(ValueError) as raised:
        LocalCluster(load_config([*WORDS, f"policy._target_=of_my_own.{name}"])).run()
    return told(raised.value)


@pytest.mark.parametrize(
    ("name", "line", "error"), [("Mistaken", 13, "operands could not be broadcast"), ("Deeper", 17, "all input arrays")]
)
def test_a_mistake_in_a_class_of_one_s_own_is_told_with_its_place_and_a_traceback(own, capsys, name, line, error):
    assert said(name).startswith(f"error: {name}.choose, {own}:{line}: {error}")
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback") and f'"{own}", line {line}' in printed


def test_what_a_constructor_of_one_s_own_refuses_is_told_with_its_place_alone(own, capsys):
    assert said("Refuses") == f"error: Refuses.__init__, {own}:7: alpha must be nice"
    assert not capsys.readouterr().err


def test_what_ours_says_of_a_class_of_one_s_own_is_told_as_it_is(own, capsys):
    assert said("OutOfRange").startswith("error: OutOfRange chose row 9: expected 0 to 1")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("word", ["workload.path=/nowhere", "workload.max_turns=0", "index._target_=numpy.zeros"])
def test_an_option_that_is_refused_has_no_place(word):
    with pytest.raises(ValueError) as raised:
        LocalCluster(load_config(["exec=simulated", word])).run()
    assert told(raised.value) == f"error: {raised.value}"
