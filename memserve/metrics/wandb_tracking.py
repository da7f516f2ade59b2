"""WandbTracking: results in Weights & Biases. The only module that imports wandb; loaded only when it is chosen."""

from pathlib import Path
from typing import Any, Literal

import wandb

from memserve.metrics.report import Report
from memserve.metrics.tracking import Tracking, flatten_figures

MODES = ("offline", "online")


class WandbTracking(Tracking):
    """One wandb run a run of ours: the configuration as its config, every figure of the report in its summary.

    mode: "offline" writes to disk, for `wandb sync` later; "online" sends at once.
    project, entity, group, name: wandb's words; None leaves the choice to wandb.
    """

    def __init__(
        self,
        project: str = "memserve",
        mode: Literal["offline", "online"] = "offline",
        entity: str | None = None,
        group: str | None = None,
        name: str | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"tracking.mode={mode!r}: expected one of {', '.join(MODES)}")
        self._mode: Literal["offline", "online"] = mode
        self._project, self._entity, self._group, self._name = project, entity, group, name

    def record(self, config: dict[str, Any], report: Report, directory: Path | None) -> None:
        """See Tracking. wandb's files go under `directory`, else under the working directory."""
        run = wandb.init(
            project=self._project,
            entity=self._entity,
            group=self._group,
            name=self._name,
            mode=self._mode,
            config=config,
            dir=None if directory is None else str(directory),
            settings=wandb.Settings(silent=True, console="off"),
        )
        run.summary.update(dict(flatten_figures(report)))
        run.finish()
