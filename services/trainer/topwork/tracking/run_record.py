"""What a run has reported so far: the epochs of its stages and its outcome, live or from storage."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from topwork.artifacts import read_json_record
from topwork.clients.s3.storage import Storage
from topwork.progress import StageProgress
from topwork.registry import versions
from topwork.registry.stage_results import TRAINING_STAGES, read_run_result
from topwork.registry.versions import Version
from topwork.spec import TransferJob

Status = Literal["FINISHED", "FAILED", "KILLED"]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: FINISHED, FAILED, or KILLED if a stop was requested.
        metrics: Metrics of the evaluation, by split and name, such as `test/accuracy`.
        version: The published version; None without.
        error: Why it failed.
    """

    status: Status
    metrics: dict[str, float] = field(default_factory=dict)
    version: Version | None = None
    error: str = ""


@dataclass(frozen=True)
class RunRecord:
    """The epochs and the outcome of a run.

    Attributes:
        job: The job of the run, or one of its folds.
        stages: Progress of each training stage, by its name, in order.
        outcome: How the run ended; None if it has not ended.
        parent: Name of the run that this one is a fold of; empty if it is none.
        is_running: Whether this process trains the run.
    """

    job: TransferJob
    stages: dict[str, StageProgress] = field(default_factory=dict)
    outcome: Outcome | None = None
    parent: str = ""
    is_running: bool = False


class Epoch(NamedTuple):
    """A completed epoch.

    Attributes:
        number: Number of the epoch in its stage, from 1.
        time: Seconds since 1970: the start of the stage plus the duration of its epochs until this one. Pauses between
            an interruption and its resume do not count, so that the times are the same after a restart.
        values: Loss, learning rate and all other values of the epoch, by their name in the history.
    """

    number: int
    time: float
    values: dict[str, float]


def list_epochs(progress: StageProgress) -> list[Epoch]:
    """Return the epochs of a stage with their times."""
    epochs, time = [], progress.started.timestamp()
    for row in progress.rows:
        time += float(row["seconds"])
        values = {name: float(value) for name, value in row.items() if name not in {"stage", "epoch"}}
        epochs.append(Epoch(int(row["epoch"]), time, values))
    return epochs


class _Published(BaseModel):
    """The part of `runs/<run>/publish/done.json` that identifies the version."""

    model_config = ConfigDict(frozen=True)

    format: int = 1
    name: str
    version: int


class _Evaluated(BaseModel):
    """The part of `runs/<run>/metrics.json` that says whether the model met its gates."""

    model_config = ConfigDict(frozen=True)

    format: int = 1
    metrics: dict[str, float]
    evaluation: dict[str, Any]
    gates: list[dict[str, Any]] = Field(default=[])


class _Validated(BaseModel):
    """The part of `runs/<run>/validation.json` with the metrics on the validation split."""

    model_config = ConfigDict(frozen=True)

    format: int = 1
    metrics: dict[str, float]


def read_stages(storage: Storage, run: str) -> dict[str, StageProgress]:
    """Read the completed training stages of a run.

    Args:
        storage: Storage of the run.
        run: Name of the run.

    Returns:
        The epochs of each completed stage, by its name, in order.

    Raises:
        DataError: If a result was not stored by topwork.
        UnavailableError: If storage cannot be reached.
    """
    results = ((stage, read_run_result(storage, run, stage)) for stage in TRAINING_STAGES)
    return {
        stage: StageProgress(stage, result.started, tuple(dict(row) for row in result.rows))
        for stage, result in results
        if result
    }


def read_outcome(storage: Storage, job: TransferJob) -> Outcome | None:
    """Read how a run ended, as far as it is stored: a published version, an evaluation, or a validation.

    Args:
        storage: Storage of the run.
        job: Its job, or the job of one of its folds.

    Returns:
        The outcome; None if the run has not ended, or ended without a result.

    Raises:
        DataError: If a result was not stored by topwork.
        UnavailableError: If storage cannot be reached.
    """
    is_fold = job.spec.dataset.fold is not None
    if job.spec.publishes and not is_fold:
        published = _read(storage, _Published, f"runs/{job.run}/publish/done.json")
        version = versions.read_version(storage, published.name, published.version) if published else None
        if version:
            return Outcome("FINISHED", _by_split(version.metrics, version.split), version)
    if not job.spec.publish.enabled and not job.spec.dataset.folds:
        validated = _read(storage, _Validated, f"runs/{job.run}/validation.json")
        return Outcome("FINISHED", _by_split(validated.metrics, "validation")) if validated else None
    evaluated = _read(storage, _Evaluated, f"runs/{job.run}/metrics.json")
    if evaluated is None:
        return None
    metrics = _by_split(evaluated.metrics, str(evaluated.evaluation["split"]))
    if missed := [f"{gate['sentence']}." for gate in evaluated.gates if not gate["met"]]:
        return Outcome("FAILED", metrics, error=" ".join(missed))
    return None if job.spec.publishes and not is_fold else Outcome("FINISHED", metrics)


def _by_split(metrics: dict[str, float], split: str) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in metrics.items()}


def _read(storage: Storage, model: type[Model], key: str) -> Model | None:
    data = storage.read(key)
    return read_json_record(model, data, storage.uri_of(key), "a result of a run") if data is not None else None
