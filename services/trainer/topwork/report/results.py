"""All that is told about a trained classifier: what the card, the report and `metrics.json` are written from."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

from topwork.data.dataset_manifest import DatasetMetadata
from topwork.report.evaluation import Evaluation
from topwork.report.export_check import Recheck
from topwork.report.gates import GateOutcome
from topwork.spec import TransferJob

# Columns that lead `history.csv`; whatever else an epoch tells follows.
LEADING = ("stage", "epoch", "loss", "accuracy", "validation_loss", "validation_accuracy", "learning_rate")
HistoryRow = dict[str, float | int | str]


@dataclass(frozen=True)
class Mistake:
    """An image that the classifier got wrong.

    Attributes:
        name: Where the image came from.
        truth: Its class.
        answer: The class that the classifier took it for.
        confidence: Probability of `answer`.
        picture: The image as a data URI.
    """

    name: str
    truth: str
    answer: str
    confidence: float
    picture: str


@dataclass(frozen=True)
class Outcome:
    """A trained and evaluated classifier, and how it came about.

    Attributes:
        job: The job.
        facts: The stored dataset.
        counts: Images by split and class, as used.
        history: One row an epoch, over all stages.
        evaluation: On the test split, or on the validation split where there is none.
        gates: Outcome of each gate.
        mistakes: The worst, first the most confident.
        lineage: What it was made from and by, ready to be shown: label to value.
        version: Its version; None as long as it is not published.
        formats: What was exported.
        recheck: How far the exported artefacts are from the evaluated model.
        notes: What a reader must know before the figures.
    """

    job: TransferJob
    facts: DatasetMetadata
    counts: dict[str, dict[str, int]]
    history: Sequence[HistoryRow]
    evaluation: Evaluation
    gates: tuple[GateOutcome, ...]
    mistakes: tuple[Mistake, ...]
    lineage: dict[str, str]
    version: int | None = None
    formats: tuple[str, ...] = ()
    recheck: Recheck | None = None
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name of the model, with its version if it has one."""
        return self.job.model_name if self.version is None else f"{self.job.model_name}/{self.version}"

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics that the job asks for, in its order, and the loss."""
        values = self.evaluation.values
        asked: dict[str, float] = {name: values[name] for name in self.job.spec.evaluate.metrics if name in values}
        return {**asked, "loss": values["loss"]}

    @property
    def main_metric(self) -> str:
        """The first metric that the job asks for and that is defined."""
        return next(iter(self.metrics))

    @property
    def step_seconds(self) -> dict[str, float]:
        """Seconds of a typical training step, by stage; see `step_seconds`."""
        return step_seconds(self.job, self.history)


def batch_sizes(job: TransferJob) -> dict[str, int]:
    """Images of a training step over all replicas, by the stages that the job has."""
    first, second = job.spec.transfer, job.spec.fine_tune
    return {"transfer": first.batch_size} | ({"fine-tune": second.batch_size or first.batch_size} if second else {})


def step_seconds(job: TransferJob, history: Sequence[HistoryRow]) -> dict[str, float]:
    """Say how long a training step took, over the epochs of each stage.

    Args:
        job: The job.
        history: Rows of the stages, each with the images_per_second of its epoch.

    Returns:
        Median of the epochs' mean step, in seconds, by stage. Of two epochs it is the faster one: the first step of a
        stage traces the graph, which belongs to no other step.
    """
    images, found = batch_sizes(job), dict[str, list[float]]()
    for row in history:
        stage = str(row["stage"])
        if stage in images and "images_per_second" in row:
            found.setdefault(stage, []).append(images[stage] / float(row["images_per_second"]))
    return {stage: median_low(seconds) for stage, seconds in found.items()}


def metrics_json(outcome: Outcome) -> bytes:
    """Write `metrics.json`: every number of the evaluation, the gates and the recheck.

    Args:
        outcome: What is told.

    Returns:
        JSON with camelCase keys; `metrics` holds the single numbers by their names in the job spec.
    """
    content: dict[str, Any] = {
        "format": 1,
        "model": outcome.job.model_name,
        "version": outcome.version,
        "run": outcome.job.run,
        "mainMetric": outcome.main_metric,
        "metrics": outcome.evaluation.values,
        "stepSeconds": outcome.step_seconds,
        "gates": [gate.model_dump(by_alias=True) for gate in outcome.gates],
        "evaluation": outcome.evaluation.model_dump(mode="json", by_alias=True),
        "recheck": outcome.recheck.model_dump(by_alias=True) if outcome.recheck else None,
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def history_csv(history: Sequence[HistoryRow]) -> bytes:
    """Write one row an epoch, over all stages; a value that an epoch does not have is left empty.

    Args:
        history: Rows of the stages.

    Returns:
        CSV with a header.
    """
    found = dict.fromkeys(name for row in history for name in row)
    columns = [name for name in LEADING if name in found] + [name for name in found if name not in LEADING]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or LEADING, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


def told(facts: Any) -> str:
    """Say what a part of a spec holds in words: `cnn filters 4 8, kernelSize 3`.

    Args:
        facts: Mappings, lists and plain values, as JSON has them.

    Returns:
        One line; what is empty is left out.
    """
    if isinstance(facts, dict):
        return ", ".join(f"{name} {told(value)}" for name, value in facts.items() if value not in ([], {}, None))
    if isinstance(facts, list | tuple):
        return " ".join(told(value) for value in facts)
    return str(facts)
