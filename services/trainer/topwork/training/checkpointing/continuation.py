"""Continues a completed stage with more epochs: keeps its last checkpoint, and starts a longer stage from it.

Training does not depend on the number of epochs that follow, so a stage that trains more epochs starts like a shorter
one with the same settings. Their common settings are the continuation key. With `spec.compute.keepCheckpoint`, a stage
stores two more objects before it is complete:

- `stages/<stage>/<key>/last-checkpoint/<input>/`: its last checkpoint
- `stages/<stage>/continued/<continuation key>/<trained epochs>-<key>-<input>.json`: lets longer stages find it
"""

from typing import Literal

import structlog
from pydantic import BaseModel, ConfigDict

from topwork.artifacts import read_json_record
from topwork.clients.s3.storage import Storage
from topwork.errors import DamagedError, DataError
from topwork.registry.stage_results import continued_prefix, last_checkpoint_prefix
from topwork.spec.digest import digest_of
from topwork.training.checkpointing.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from topwork.training.plan import StageContext

log = structlog.get_logger(__name__)


class TrainingInput(BaseModel):
    """What a stage computes its steps from. A stage is continued only with the same input, so that nothing differs.

    Attributes:
        views: Cached views of each training image; 0 if features are not cached.
        precision: Types that the trained layers compute in.
        libraries: Versions of TensorFlow and Keras: others may round differently, or have other optimizer variables.
        frozen: Hash of the weights that the stage does not change. The stage before may have been trained again.
    """

    model_config = ConfigDict(frozen=True)

    views: int
    precision: str
    libraries: str
    frozen: str

    @property
    def digest(self) -> str:
        """Digest of the input: 8 hex digits."""
        return digest_of(self.model_dump())[:8]

    def __str__(self) -> str:
        cached = "images" if not self.views else "cached features" + (f" of {self.views} views" * (self.views > 1))
        return f"{cached} in {self.precision} by {self.libraries} with frozen weights {self.frozen[:8]}"


class KeptCheckpoint(BaseModel):
    """Refers to the last checkpoint of a completed stage.

    Attributes:
        format: Version of this record.
        prefix: Storage key prefix of the checkpoint.
        input: What the stage was trained on.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    prefix: str
    input: TrainingInput


def keep_checkpoint(context: StageContext, checkpoint: Checkpoint, training_input: TrainingInput) -> None:
    """Store the last checkpoint of a stage for jobs with more epochs, unless it could not be continued. Chief only.

    Args:
        context: The stage, all of whose epochs are trained.
        checkpoint: Its state after the last epoch.
        training_input: What it was trained on.

    Raises:
        UnavailableError: If storage cannot be reached.
    """
    stage, workspace = context.plan.stage, context.workspace
    if reason := context.plan.fixed_epochs_reason:
        log.info("checkpoint not kept", stage=stage, reason=reason)
        return
    prefix = last_checkpoint_prefix(stage, context.key, training_input.digest)
    write_checkpoint(checkpoint, prefix, workspace)
    record = KeptCheckpoint(prefix=prefix, input=training_input)
    names = f"{checkpoint.state.epoch:05}-{context.key}-{training_input.digest}"
    name = f"{continued_prefix(stage, context.continuation)}{names}.json"
    workspace.storage.write(name, record.model_dump_json().encode(), content_type="application/json")
    log.info("checkpoint kept", stage=stage, epoch=checkpoint.state.epoch)


def find_kept_checkpoint(context: StageContext, training_input: TrainingInput) -> Checkpoint | None:
    """Find the newest checkpoint of a shorter stage with the same settings. This is a collective operation.

    Args:
        context: The stage, which has no checkpoint of its own.
        training_input: What it will be trained on.

    Returns:
        The checkpoint, which is the same on all nodes; None if there is none, or none that is readable.

    Raises:
        UnavailableError: If storage cannot be reached.
    """
    nodes, workspace = context.workspace.nodes, context.workspace
    if not context.continuation:
        return None
    if reason := context.plan.fixed_epochs_reason:
        if context.job.spec.compute.keep_checkpoint:
            log.info("training starts over", stage=context.plan.stage, reason=reason)
        return None
    prefix, checkpoint = _select(context, training_input) if nodes.is_chief else ("", None)
    prefix = nodes.broadcast(prefix)
    if nodes.is_chief or not prefix:
        return checkpoint
    return read_checkpoint(prefix, workspace)


def _select(context: StageContext, training_input: TrainingInput) -> tuple[str, Checkpoint | None]:
    plan, storage = context.plan, context.workspace.storage
    continued = continued_prefix(plan.stage, context.continuation)
    for name in sorted((stored.key for stored in storage.list(continued)), reverse=True):
        epochs = name.removeprefix(continued).partition("-")[0]
        if not epochs.isdecimal() or (epoch := int(epochs)) > plan.epochs:  # other objects are not topwork's
            continue
        try:
            if (kept := _read(storage, name)) is None:
                continue
            if kept.input != training_input:
                reason = f"that stage was trained on {kept.input}, but this one uses {training_input}"
                log.info("checkpoint of a shorter stage not used", stage=plan.stage, epoch=epoch, reason=reason)
                continue
            return kept.prefix, read_checkpoint(kept.prefix, context.workspace)
        except (DataError, DamagedError) as error:  # also of another format: the stage can start over
            log.warning("checkpoint of a shorter stage not used", stage=plan.stage, epoch=epoch, reason=str(error))
    return "", None


def _read(storage: Storage, name: str) -> KeptCheckpoint | None:
    data = storage.read(name)
    return read_json_record(KeptCheckpoint, data, storage.uri_of(name), "a kept checkpoint") if data else None
