from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from memserve.cluster.make import make
from memserve.config.errors import ConfigError
from memserve.workload import AgentWorkload, ChatWorkload, DocumentQA, SyntheticWorkload, Workload
from memserve.workload.arrivals import ClosedLoop, Gamma, Poisson

KINDS = [("chat", ChatWorkload), ("synthetic", SyntheticWorkload), ("agent", AgentWorkload), ("docqa", DocumentQA)]
CONFIGS = Path(__file__).parents[2] / "configs"


def build(name: str, *overrides: str) -> Workload:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(config_name=f"workload/{name}", overrides=list(overrides))
    workload = make(OmegaConf.to_container(config.workload))
    assert isinstance(workload, Workload)
    return workload


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize(("arrivals", "process"), [("poisson", Poisson), ("gamma", Gamma), ("closed_loop", ClosedLoop)])
def test_every_workload_takes_every_arrival_process(name, kind, arrivals, process):
    workload = build(name, f"workload/arrivals={arrivals}")
    assert isinstance(workload, kind)
    assert isinstance(workload._arrivals, process)


@pytest.mark.parametrize("name", [name for name, _ in KINDS])
def test_the_rate_is_an_option_of_the_workload(name):
    assert build(name, "workload.rate=3", "workload/arrivals=gamma")._rate == 3
    with pytest.raises(ConfigError, match="closed loop has no rate"):
        build(name, "workload.rate=3", "workload/arrivals=closed_loop")


@pytest.mark.parametrize("lengths", ["fixed", "uniform", "lognormal"])
def test_synthetic_takes_every_distribution_of_lengths(lengths):
    build("synthetic", f"workload/lengths={lengths}", "workload.num_sessions=3", "workload.max_output_tokens=4")
