"""Progress: how far a run is. A live bar on a terminal, a line at every tenth elsewhere. Knows counts only."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

NUM_LINES = 10  # printed over a run where there is no terminal


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
        if self._console.is_terminal:
            self._bar = _make_bar(self._console)
            self._task = self._bar.add_task(label, total=None, now="")
            self._bar.start()

    def update(self, finished: int, total: int, now_s: float) -> None:
        """`finished` of `total` requests have ended; now_s: seconds on the cluster's clock."""
        if self._bar is not None:
            self._bar.update(self._task, completed=finished, total=total, now=f"cluster time {now_s:.1f} s")
            return
        tenths = NUM_LINES * finished // total if total else 0
        if tenths > self._tenths:
            self._tenths = tenths
            self._console.print(f"{self._label}: {finished} of {total}, cluster time {now_s:.1f} s", highlight=False)

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
    )
