"""Progress: how far a run is. A live bar on a terminal, a line at every tenth elsewhere. Knows counts only.

The bar is drawn inside `update`, at most ten times a second: a drawing thread would run into the steps being measured.
"""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from memserve.clock import NS_PER_S, monotonic_ns

NUM_LINES = 10  # printed over a run where there is no terminal
DRAW_EVERY_NS = NS_PER_S // 10


class Progress:
    """Shows `update`s until it is closed; a context manager.

    console: where to; None is standard error, which keeps standard output for results.
    """

    def __init__(self, label: str = "requests", console: Console | None = None) -> None:
        self._console = Console(stderr=True) if console is None else console
        self._label = label
        self._tenths = 0
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._drawn_ns = 0
        if self._console.is_terminal:
            self._bar = _make_bar(self._console)
            self._task = self._bar.add_task(label, total=None, now="")
            self._bar.start()

    def update(self, finished: int, total: int, now_s: float) -> None:
        """`finished` of `total` requests have ended; now_s: seconds on the cluster's clock."""
        if self._bar is not None:
            self._draw(self._bar, finished, total, now_s)
            return
        tenths = NUM_LINES * finished // total if total else 0
        if tenths > self._tenths:
            self._console.print(f"{self._label}: {finished} of {total}, cluster time {now_s:.1f} s", highlight=False)
        self._tenths = tenths  # smaller again when another run begins

    def _draw(self, bar: RichProgress, finished: int, total: int, now_s: float) -> None:
        if finished < total and monotonic_ns() - self._drawn_ns < DRAW_EVERY_NS:
            return
        bar.update(self._task, completed=finished, total=total, now=f"cluster time {now_s:.1f} s", refresh=True)
        self._drawn_ns = monotonic_ns()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _make_bar(console: Console) -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
        console=console,
        transient=True,
        auto_refresh=False,
    )
