"""IdleRunner: in the place of a model where none runs, on a store."""

from collections.abc import Generator

from memserve.request import Runner, ScheduledBatch, StepOutput


class IdleRunner(Runner):
    """Nobody gives it a batch."""

    num_near_ties = 0

    def forward(self, batch: ScheduledBatch) -> StepOutput:
        raise AssertionError("a store computes nothing")

    def forward_by_layer(self, batch: ScheduledBatch) -> Generator[int, None, StepOutput]:
        raise AssertionError("a store computes nothing")
