"""Runs: what is played several times of one configuration: the same again (`repeats=`), or drawn anew (`seeds=`)."""

from dataclasses import replace

from memserve.config.errors import ConfigError, require
from memserve.config.schema import RunConfig


def num_runs(cfg: RunConfig) -> int:
    """How many runs there are; one of the two is 1."""
    return max(cfg.repeats, cfg.seeds)


def seeds_of(cfg: RunConfig) -> list[int]:
    """The seed of each seed's run."""
    return [cfg.seed + number for number in range(cfg.seeds)]


def of_run(cfg: RunConfig, number: int) -> RunConfig:
    """The configuration that a run, counted from 0, is played by: `cfg`, but for the seed where there are several.

    By it the workload is drawn, policies break ties and requests get theirs; a model's random weights are of the first.
    """
    if number == 0 or cfg.seeds == 1:
        return cfg
    return replace(cfg, seed=cfg.seed + number)


def check_runs(cfg: RunConfig) -> None:
    """Raises ConfigError for numbers of runs that are none, or that ask for the same run again."""
    require(cfg.seed >= 0, "seed", cfg.seed, "an integer >= 0")
    for name in ("repeats", "seeds"):
        require(getattr(cfg, name) >= 1, name, getattr(cfg, name), "an integer >= 1")
    if cfg.repeats > 1 and cfg.step_time == "model":
        raise ConfigError(f"repeats={cfg.repeats} contradicts step_time=model, by which every run is the same: "
                          f"expected seeds={cfg.repeats}, which draws the workload anew for each run")  # fmt: skip
    if cfg.repeats > 1 and cfg.seeds > 1:
        raise ConfigError(f"repeats={cfg.repeats} contradicts seeds={cfg.seeds}: expected 1 for one of them")
