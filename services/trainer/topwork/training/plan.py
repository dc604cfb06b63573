"""What a training stage does: its phases and settings."""

from dataclasses import dataclass

from topwork.model.freezing import Unfrozen
from topwork.registry.stage_results import TrainingStage
from topwork.spec.training import EarlyStopping, Loss, Optimizer
from topwork.training.feature_cache.policy import Caching


@dataclass(frozen=True)
class Phase:
    """Epochs with the same layers trained by the same optimizer.

    Attributes:
        unfrozen: What of the base is trained.
        epochs: Epochs at most.
        optimizer: Settings of a new optimizer.
    """

    unfrozen: Unfrozen
    epochs: int
    optimizer: Optimizer


@dataclass(frozen=True)
class Plan:
    """What a stage does.

    Attributes:
        stage: Its name.
        phases: What is trained, in order; each trains what the one before did, and more.
        batch_size: Images a step over all replicas.
        loss: Loss by name, or with its parameters.
        balanced: Whether each class counts alike.
        early_stopping: When to end a phase before its last epoch.
        seed: Seed of the order of the images, their views and the new weights.
        caching: Whether features of the frozen layers may be computed once, and in how many views.
        batch_norm: Whether the batch normalizations of the base are trained where they're unfrozen.
        remedies: What to do where input holds training up; known once it is known what that input is.
    """

    stage: TrainingStage
    phases: tuple[Phase, ...]
    batch_size: int
    loss: Loss | str
    balanced: bool
    early_stopping: EarlyStopping | None
    seed: int
    caching: Caching
    batch_norm: bool = False
    remedies: str = ""

    @property
    def epochs(self) -> int:
        """Epochs at most over all phases."""
        return sum(phase.epochs for phase in self.phases)

    def end_of(self, phase: int) -> int:
        """Epochs of the stage that are complete when a phase has run to its end."""
        return sum(one.epochs for one in self.phases[: phase + 1])
