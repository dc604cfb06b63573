"""The state of a stage that checkpoints store with the weights: progress, history and early stopping."""

from datetime import UTC, datetime

from pydantic import BaseModel, Field

from topwork.registry.stage_results import HistoryRow
from topwork.spec.fine_tune import Keep
from topwork.spec.training import EarlyStopping


class TrainState(BaseModel):
    """The progress of a training stage. Checkpoints store it as JSON.

    Attributes:
        phase: Index of the current phase. Gradual unfreezing has several.
        ended: Whether early stopping ended that phase.
        epoch: Completed epochs of the stage.
        step: Completed steps of the current epoch.
        epoch_seconds: Duration of those steps in seconds.
        epoch_wait_seconds: Part of that duration in which training waited for input, in seconds.
        wait: Epochs since the last improvement.
        best_value: Best value of the monitored metric; None before the first epoch.
        best_epoch: Epoch whose weights are kept, counted from 1; 0 for the weights that the stage started with.
        start: Metrics of the weights that the stage started with, on the validation split; None if they are not
            compared with those of the epochs.
        rows: History, one row per completed epoch.
        started: Time at which the stage started for the first time.
        frozen: Hash of the weights that the stage must not change.
    """

    phase: int = 0
    ended: bool = False
    epoch: int = 0
    step: int = 0
    epoch_seconds: float = 0.0
    epoch_wait_seconds: float = 0.0
    wait: int = 0
    best_value: float | None = None
    best_epoch: int = 0
    start: dict[str, float] | None = None
    rows: list[HistoryRow] = Field(default_factory=list)
    started: datetime = Field(default_factory=lambda: datetime.now(UTC))
    frozen: str = ""

    def complete_epoch(self) -> tuple[float, float]:
        """Count the current epoch as completed and start the next one.

        Returns:
            Duration of the completed epoch, and the part of it in which training waited for input, in seconds.
        """
        durations = self.epoch_seconds, self.epoch_wait_seconds
        self.epoch, self.step, self.epoch_seconds, self.epoch_wait_seconds = self.epoch + 1, 0, 0.0, 0.0
        return durations

    def record_start(self, validation: dict[str, float], early_stopping: EarlyStopping | None) -> None:
        """Count the weights that the stage starts with as epoch 0, which later epochs have to improve on.

        Args:
            validation: Metrics on the validation split.
            early_stopping: As in `record_validation`.
        """
        self.start, self.best_value = validation, _score(validation, early_stopping)

    def record_validation(
        self, validation: dict[str, float] | None, early_stopping: EarlyStopping | None, keep: Keep = "best"
    ) -> bool:
        """Record the metrics of the epoch that just completed: compare it with the best one, and apply early stopping.

        Args:
            validation: Metrics on the validation split. Without a validation split, None: the last epoch is the best.
            early_stopping: Settings; None monitors the loss and never stops early.
            keep: Whether to keep the weights of the best epoch, or those of the last one.

        Returns:
            Whether the weights of this epoch must be kept.
        """
        improved = validation is None or self._improves(validation, early_stopping)
        if improved or keep == "last":
            self.best_epoch = self.epoch
        return improved or keep == "last"

    def _improves(self, validation: dict[str, float], early_stopping: EarlyStopping | None) -> bool:
        min_delta = early_stopping.min_delta if early_stopping else 0.0
        score = _score(validation, early_stopping)
        is_better = self.best_value is None or score > self.best_value + min_delta
        if is_better and not self._loses_accuracy(validation, early_stopping):
            self.best_value, self.wait = score, 0
            return True
        self.wait += 1
        self.ended = early_stopping is not None and self.wait >= early_stopping.patience
        return False

    def _loses_accuracy(self, validation: dict[str, float], early_stopping: EarlyStopping | None) -> bool:
        """Return whether a lower loss comes with a lower accuracy than at the start of the stage.

        Fine-tuning can lower the loss of an overconfident classifier a lot and still make it useless.
        """
        monitor = early_stopping.monitor if early_stopping else "loss"
        if self.start is None or monitor != "loss":
            return False
        return validation.get("accuracy", 1.0) < self.start.get("accuracy", 0.0)

    def start_next_phase(self) -> None:
        """Continue with the next phase and reset the patience of early stopping."""
        self.phase, self.ended, self.wait = self.phase + 1, False, 0


def _score(validation: dict[str, float], early_stopping: EarlyStopping | None) -> float:
    """Return the monitored metric, negated if lower is better: a higher score is always better."""
    monitor = early_stopping.monitor if early_stopping else "loss"
    return -validation[monitor] if monitor == "loss" else validation[monitor]
