"""FittedCostModel: costs that were measured, from a JSON file that says where and on what. Knows when to refuse it.

The file is written by scripts/profile_cost_model.py. Costs of another model are never taken; those of another machine
only where that is said, since simulating a machine that one does not have is what simulation is for.
"""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from memserve.sched.cost_model.arch import ArchCostModel
from memserve.sched.cost_model.base import CostModel, Subject
from memserve.sched.cost_model.fit import MeasuredStep
from memserve.sched.cost_model.operator import OperatorCostModel

LEVELS = ("operator", "arch")
OF_THE_MACHINE = ("machine", "cores", "threads")
OF_THE_MODEL = ("shape", "dtype", "attention", "tensor_parallel")


class Provenance(msgspec.Struct, frozen=True):
    """Where a fit comes from. written_at: ISO date and time.  num_repeats: of each step.

    noise_percent: mean spread of the held-out steps' repeats, what no model can be better than.
    held_out_percent: mean absolute error over them, by level.
    """

    written_at: str
    model: str
    torch: str
    block_size: int
    num_repeats: int
    noise_percent: float
    held_out_percent: dict[str, float]


class CostFile(msgspec.Struct, frozen=True):
    """What is in a file. operator, arch: the arguments of the two classes.  fitted, held_out: the steps measured."""

    subject: Subject
    provenance: Provenance
    operator: dict[str, Any]
    arch: dict[str, Any]
    fitted: list[MeasuredStep]
    held_out: list[MeasuredStep]


def load_cost_file(path: str | Path) -> CostFile:
    """Raises ValueError for a file that is not there, or is none of ours."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=CostFile)
    except OSError as error:
        raise ValueError(
            f"cost_model.path={path}: expected a file of scripts/profile_cost_model.py ({error})"
        ) from error
    except msgspec.DecodeError as error:
        raise ValueError(f"cost_model.path={path}: not a file of scripts/profile_cost_model.py ({error})") from error


class FittedCostModel(CostModel):
    """The model in a file. level: operator or arch.  allow_other_machine: take the costs of a machine that this is not.

    Raises ValueError for another level, and for files that `load_cost_file` refuses.
    """

    def __init__(self, path: str, level: str = "operator", allow_other_machine: bool = False) -> None:
        if level not in LEVELS:
            raise ValueError(f"cost_model.level={level!r}: expected one of {', '.join(LEVELS)}")
        self.file = load_cost_file(path)
        self._path, self._allow_other_machine = path, allow_other_machine
        models = {"operator": OperatorCostModel, "arch": ArchCostModel}
        try:
            self.model: CostModel = models[level](**getattr(self.file, level))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"cost_model.path={path}: its {level}-level costs are none of this version's ({error})"
            ) from error
        self.swap_block_s, self.swap_block_tokens = self.model.swap_block_s, self.file.provenance.block_size

    def check(self, subject: Subject) -> None:
        """Raises ValueError naming the first thing in which the file differs from what is about to run."""
        names: tuple[str, ...] = () if self._allow_other_machine else OF_THE_MACHINE
        if subject.shape:  # else no model runs, and the file alone says which one is meant
            names += OF_THE_MODEL
        for name in names:
            theirs, ours = getattr(self.file.subject, name), getattr(subject, name)
            if theirs != ours:
                hint = ", or cost_model.allow_other_machine=true" if name in OF_THE_MACHINE else ""
                raise ValueError(f"cost_model.path={self._path} is of {name}={theirs!r}: expected {ours!r}{hint}")

    def _one_s(self, num_cached: int, num_new: int) -> float:
        return self.model._one_s(num_cached, num_new)

    def _column_s(self, num_cached: np.ndarray, num_new: np.ndarray) -> np.ndarray:
        return self.model._column_s(num_cached, num_new)

    def step_time_s(self, num_cached: np.ndarray, num_new: np.ndarray, num_more: np.ndarray) -> np.ndarray:
        return self.model.step_time_s(num_cached, num_new, num_more)
