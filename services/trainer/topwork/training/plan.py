"""The plan of a training stage: its phases, its settings, and the context that it runs in."""

from dataclasses import dataclass

from topwork.model.freezing import UnfreezeSetting
from topwork.registry.stage_results import TrainingStage, attempt_prefix
from topwork.spec import TransferJob
from topwork.spec.fine_tune import Keep
from topwork.spec.optimizer import Optimizer
from topwork.spec.training import EarlyStopping, Loss
from topwork.training.feature_cache.policy import FeatureCachePolicy
from topwork.workspace import Workspace


@dataclass(frozen=True)
class TrainingPhase:
    """A number of epochs that train the same layers with the same optimizer.

    Attributes:
        unfrozen: Layers of the base that are trained.
        epochs: Maximum number of epochs.
        optimizer: Settings of the optimizer; every phase creates a new one.
    """

    unfrozen: UnfreezeSetting
    epochs: int
    optimizer: Optimizer


@dataclass(frozen=True)
class TrainingPlan:
    """All settings of one training stage from the spec.

    Attributes:
        stage: Name of the stage.
        phases: Phases in order; each trains the layers of the phase before it, and more.
        batch_size: Global batch size: images per step over all replicas.
        loss: Name of the loss, or the loss with its parameters.
        balance_classes: Whether class weights make every class count equally.
        early_stopping: When to end a phase before its last epoch; None never does.
        seed: Seed of the image order, of random augmentation and of new weights.
        feature_cache: Whether the output of the frozen layers may be cached, and for how many views.
        keep: Whether to keep the weights of the best epoch, or those of the last one.
        train_batch_norm: Whether batch normalization layers of the base are trained when they are unfrozen.
    """

    stage: TrainingStage
    phases: tuple[TrainingPhase, ...]
    batch_size: int
    loss: Loss | str
    balance_classes: bool
    early_stopping: EarlyStopping | None
    seed: int
    feature_cache: FeatureCachePolicy
    train_batch_norm: bool = False
    keep: Keep = "best"

    @property
    def batch_size_key(self) -> str:
        """Key of the batch size in the spec, for messages."""
        return f"spec.{'transfer' if self.stage == 'transfer' else 'fineTune'}.batchSize"

    @property
    def monitor(self) -> str:
        """Metric on the validation split that decides which epoch is the best."""
        return self.early_stopping.monitor if self.early_stopping else "loss"

    @property
    def improves_a_classifier(self) -> bool:
        """Whether the stage starts with trained weights, which are kept if no epoch is better: epoch 0 of the stage."""
        return self.stage == "fine-tune"

    @property
    def epochs(self) -> int:
        """Maximum number of epochs over all phases."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def fixed_epochs_reason(self) -> str:
        """Why the stage cannot be continued with more epochs; empty if it can.

        Whatever happens in an epoch must not depend on the number of epochs that follow.
        """
        if len(self.phases) > 1:
            return "unfreeze.steps sets the epochs of each step"
        schedule = self.phases[0].optimizer.schedule.name
        return f"the schedule {schedule} depends on the number of epochs" if schedule == "cosine" else ""

    def last_epoch(self, phase: int) -> int:
        """Return the number of the last epoch of a phase, counted from 1 at the start of the stage.

        Args:
            phase: Index of the phase.
        """
        return sum(earlier.epochs for earlier in self.phases[: phase + 1])


@dataclass(frozen=True)
class StageContext:
    """A training stage of a job, and the workspace that it runs in.

    Attributes:
        job: The job.
        plan: Plan of the stage.
        key: Key of the result of the stage.
        workspace: Storage, metrics, progress and scratch directory.
        continuation: Key that stages share which differ only in their number of epochs; empty to start over always.
    """

    job: TransferJob
    plan: TrainingPlan
    key: str
    workspace: Workspace
    continuation: str = ""

    @property
    def prefix(self) -> str:
        """Storage key prefix of the checkpoints and features of this run."""
        return attempt_prefix(self.plan.stage, self.key, self.job.run)
