"""Which epoch of which stage the weights of a classifier come from."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class KeptWeights(BaseModel):
    """The origin of the weights of a trained classifier.

    Attributes:
        stage: Stage that trained the weights.
        epoch: Epoch of that stage, counted from 1.
        keep: Whether the best epoch or the last epoch was kept.
        monitor: Metric on the validation split that decides which epoch is the best; None without a validation split.
        fine_tuned: Whether the job has fine-tuned; the weights may be those of transfer nevertheless.
        start: Metrics on the validation split before the first epoch of fine-tuning; empty if they were not measured.
        kept: Metrics on the validation split of the kept epoch of fine-tuning; empty if they were not measured.
    """

    model_config = ConfigDict(frozen=True)

    stage: Literal["transfer", "fine-tune"]
    epoch: int
    keep: Literal["best", "last"] = "best"
    monitor: str | None = None
    fine_tuned: bool = False
    start: dict[str, float] = {}
    kept: dict[str, float] = {}

    def __str__(self) -> str:
        """Name the stage and the epoch."""
        return f"{self.stage}, epoch {self.epoch}"

    @property
    def description(self) -> str:
        """Stage and epoch, and why that epoch was kept."""
        if self.monitor is None:
            return f"{self} (the last one: there is no validation split to compare epochs)"
        return f"{self} ({'the last one' if self.keep == 'last' else f'the best by validation {self.monitor}'})"

    @property
    def note(self) -> str:
        """Sentences for log and report if fine-tuning did not improve the model; otherwise empty."""
        if not self.fine_tuned or self.monitor is None:
            return ""
        if self.stage == "transfer":
            accuracy = self.start.get("accuracy") if self.monitor == "loss" else None
            limit = "" if accuracy is None else f" without lowering its accuracy ({accuracy:.4f})"
            return (
                f"Fine-tuning did not improve the validation {self.monitor} of transfer "
                f"({self.start[self.monitor]:.4f}){limit}, so the weights are those of {self}. To keep those of "
                "fine-tuning anyway, set spec.fineTune.keep: last."
            )
        before = {name: value for name, value in self.start.items() if _is_worse(name, self.kept[name], value)}
        changes = ", ".join(f"{name} from {value:.4f} to {self.kept[name]:.4f}" for name, value in before.items())
        if self.monitor in before:
            return (
                f"Fine-tuning made the model worse on the validation split: {changes}. The weights are those of "
                f"{self}, because spec.fineTune.keep is {self.keep}."
            )
        if changes:
            return (
                f"Fine-tuning improved the validation {self.monitor} but not every metric: {changes}. The metric that "
                "decides is spec.fineTune.earlyStopping.monitor."
            )
        return ""


def _is_worse(name: str, value: float, before: float) -> bool:
    return value > before if name == "loss" else value < before
