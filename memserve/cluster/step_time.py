"""StepTime: where a step's virtual duration comes from, the machine's clock or a cost model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from memserve.clock import Stopwatch
from memserve.request import Role, ScheduledBatch
from memserve.sched.cost_model.base import CostModel


class StepWatch:
    """Times a step from here on. What is computed on a CPU is done when the call returns."""

    def __init__(self) -> None:
        self._watch = Stopwatch()
        self._layers_ns: list[int] = []

    def layer_written(self) -> None:
        """The next layer's KV is written, or is what the device has been given last."""
        self._layers_ns.append(self._watch.elapsed_ns())

    def stop(self) -> tuple[int, list[int]]:
        """Nanoseconds until the step has ended, which is now, and until each layer was written."""
        return self._watch.stop_ns(), self._layers_ns


class GpuStepWatch(StepWatch):
    """A GPU runs behind who gives it work: layers are timed by its own events, the step by the work's end.

    Work of before is not counted: the watch starts when the GPU has nothing to do.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        super().__init__()
        self._start, self._layers = self._event(), list[torch.cuda.Event]()

    def layer_written(self) -> None:
        self._layers.append(self._event())

    def stop(self) -> tuple[int, list[int]]:
        torch.cuda.synchronize(self._device)
        step_ns = self._watch.stop_ns()
        return step_ns, [round(self._start.elapsed_time(layer) * 1e6) for layer in self._layers]

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch does not annotate its events
        event.record(torch.cuda.current_stream(self._device))
        return event


class StepTime(ABC):
    """`is_measured`: the step is computed at its beginning and timed."""

    is_measured: bool

    def watch(self) -> StepWatch:
        """Starts to time a step."""
        return StepWatch()

    @abstractmethod
    def durations_ns(self, batch: ScheduledBatch, role: Role) -> list[int]:
        """Nanoseconds of each of the batch's steps on an instance of that role, known beforehand."""


class Measured(StepTime):
    """Scheduling, forward and commit on this machine, by its clock. device: that the forward runs on."""

    is_measured = True

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = torch.device("cpu") if device is None else device

    def watch(self) -> StepWatch:
        return GpuStepWatch(self._device) if self._device.type == "cuda" else StepWatch()

    def durations_ns(self, batch: ScheduledBatch, role: Role) -> list[int]:
        raise TypeError("a measured step has no duration before it is computed")


class Modelled(StepTime):
    """By a cost model of each role's instances: repeatable to the nanosecond on any machine."""

    is_measured = False

    def __init__(self, cost_models: Mapping[Role, CostModel]) -> None:
        self._cost_models = dict(cost_models)

    def durations_ns(self, batch: ScheduledBatch, role: Role) -> list[int]:
        return self._cost_models[role].step_times_ns(batch)
