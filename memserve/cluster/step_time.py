"""StepTime: where a step's virtual duration comes from, the machine's clock or a cost model."""

from abc import ABC, abstractmethod

from memserve.request import ScheduledBatch
from memserve.sched.cost_model.base import CostModel


class StepTime(ABC):
    """`is_measured`: the step is computed at its beginning and timed."""

    is_measured: bool

    @abstractmethod
    def durations_ns(self, batch: ScheduledBatch) -> list[int]:
        """Nanoseconds of each of the batch's steps, known beforehand."""


class Measured(StepTime):
    """Scheduling, forward and commit on this machine, by its clock."""

    is_measured = True

    def durations_ns(self, batch: ScheduledBatch) -> list[int]:
        raise TypeError("a measured step has no duration before it is computed")


class Modelled(StepTime):
    """By a cost model: repeatable to the nanosecond on any machine."""

    is_measured = False

    def __init__(self, cost_model: CostModel) -> None:
        self._cost_model = cost_model

    def durations_ns(self, batch: ScheduledBatch) -> list[int]:
        return self._cost_model.step_times_ns(batch)
