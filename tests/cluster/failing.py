"""A queue order that fails once, in the first process that comes so far: `queue._target_=cluster.failing.FailsOnce`."""

from pathlib import Path

from memserve.sched.queue_policy import FCFS


class FailsOnce(FCFS):
    """marker: a file that is there afterwards.  after: requests that are asked for before, in that process."""

    def __init__(self, marker: str, after: int) -> None:
        self._marker, self._num_left = Path(marker), after

    def key(self, request, num_cached):
        self._num_left -= not request.request_id.startswith("warm-up")
        if self._num_left < 0 and not self._marker.exists():
            self._marker.touch()
            raise RuntimeError("this queue fails once")
        return super().key(request, num_cached)
