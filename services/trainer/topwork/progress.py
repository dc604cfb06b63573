"""Progress of long operations and of training: the interfaces that stages report to."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from topwork.spec import TransferJob

Fact = str | int | float | bool | None


class Tracker(Protocol):
    """Counts the completed items of an operation."""

    def advance(self, count: int = 1, **facts: Fact) -> None:
        """Add completed items.

        Args:
            count: Number of items that completed since the last call.
            **facts: Values to show next to the bar, such as the loss.
        """


class Progress(Protocol):
    """Shows how far long operations are."""

    def track(self, what: str, total: int | None) -> AbstractContextManager[Tracker]:
        """Show the progress of an operation while the block runs.

        Args:
            what: Name of the operation, such as `transfer`.
            total: Number of items; None if unknown.
        """


@dataclass(frozen=True)
class StageProgress:
    """The completed epochs of a training stage.

    Attributes:
        stage: `transfer` or `fine-tune`.
        started: Time at which the stage started for the first time.
        rows: One history row per epoch, as in `topwork.registry.stage_results.Classifier`.
    """

    stage: str
    started: datetime
    rows: tuple[Mapping[str, float | int | str], ...]


class Followers(Protocol):
    """Services that follow the training, such as MLflow. They never stop it and never slow it down."""

    def report(self, job: TransferJob, progress: StageProgress) -> None:
        """Report the epochs of a stage after each epoch. Returns at once, and raises nothing.

        Args:
            job: The job, or one of its folds.
            progress: All epochs of the stage so far.
        """


class NoFollowers:
    """Nothing follows the training."""

    def report(self, job: TransferJob, progress: StageProgress) -> None:
        """Ignore the epochs."""
