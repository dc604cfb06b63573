"""How far a stage is: what a checkpoint keeps beside weights, and when to end."""

from datetime import UTC, datetime

from pydantic import BaseModel, Field

from topwork.registry.stage_results import Row
from topwork.spec.training import EarlyStopping


class Course(BaseModel):
    """How far a stage is.

    Attributes:
        phase: Index of the phase that runs: gradual unfreezing has several.
        ended: Whether that phase was ended by early stopping.
        epoch: Complete epochs of the stage.
        step: Steps done of the epoch that has begun.
        epoch_seconds: Time that those steps took.
        epoch_wait_seconds: Time of it in which training stood still for want of input.
        wait: Epochs since the last gain.
        best_value: Best value of what is monitored.
        best_epoch: Its epoch, counted from 1.
        rows: One for each complete epoch.
        started: When the stage was first started.
        frozen: Digest of the weights that the stage must not change.
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
    rows: list[Row] = Field(default_factory=list)
    started: datetime = Field(default_factory=lambda: datetime.now(UTC))
    frozen: str = ""

    def judge(self, measured: dict[str, float] | None, rule: EarlyStopping | None) -> bool:
        """Say whether the epoch that has just ended is the best, and end the phase where it is time.

        Args:
            measured: Values on the validation split; None without one, where the last epoch is the best.
            rule: Early stopping; None watches the loss and never ends early.

        Returns:
            Whether its weights are to be kept.
        """
        if measured is None:
            self.best_epoch = self.epoch
            return True
        name, patience, delta = (rule.monitor, rule.patience, rule.min_delta) if rule else ("loss", None, 0.0)
        # Everything but the loss is better when it's greater.
        value = -measured[name] if name == "loss" else measured[name]
        if self.best_value is None or value > self.best_value + delta:
            self.best_value, self.best_epoch, self.wait = value, self.epoch, 0
            return True
        self.wait += 1
        self.ended = patience is not None and self.wait >= patience
        return False

    def next_phase(self) -> None:
        """Go on to the next phase, with patience as new."""
        self.phase, self.ended, self.wait = self.phase + 1, False, 0
