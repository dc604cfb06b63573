"""TransferJob, the whole of a job spec."""

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from topwork.spec.compute import Compute, LabelKey, LabelValue, Metrics
from topwork.spec.dataset import Dataset
from topwork.spec.evaluation import DnsLabel, Evaluate, Publish
from topwork.spec.model import Augmentation, Model
from topwork.spec.section import Part, Whole
from topwork.spec.training import FineTune, Transfer
from topwork.spec.uris import StorageUri

# What changes no result, so that a run goes on when it is changed.
NO_RESULT: Any = {
    "metadata": {"labels": True},
    "spec": {"compute": True, "metrics": True, "dataset": {"on_missing_class": True}},
}


class Metadata(Part):
    """Name and labels, as on any Kubernetes object."""

    name: DnsLabel = Field(description="DNS-1123 label of at most 40 characters; names the job, its dataset and model.")
    labels: dict[LabelKey, LabelValue] = Field(default={}, description="Labels that are copied to every object.")


class JobSpec(Part):
    """What is to be done."""

    storage: StorageUri = Field(description="s3://bucket/prefix; everything that the job reads and writes lies below.")
    dataset: Dataset = Field(description="The images.")
    model: Model = Field(description="The classifier.")
    augmentation: Augmentation = Field(default=Augmentation(), description="Random changes of the training images.")
    transfer: Transfer = Field(default=Transfer(), description="Stage 1: the head.")
    fine_tune: FineTune | None = Field(default=None, description="Stage 2: the base too; without it, none.")
    evaluate: Evaluate = Field(default=Evaluate(), description="Evaluation and gates.")
    publish: Publish = Field(default=Publish(), description="What is handed over.")
    compute: Compute = Field(default=Compute(), description="What the Kubernetes Job asks for.")
    metrics: Metrics = Field(default=Metrics(), description="How the metrics leave the job.")
    seed: Whole = Field(default=42, ge=0, le=2**31 - 1, description="Seed of every random choice.")


class TransferJob(Part):
    """A transfer-learning job, shaped like a Kubernetes object."""

    api_version: Literal["topwork.dev/v1alpha1"] = Field(description="Version of this format.")
    kind: Literal["TransferJob"] = Field(description="Kind of object.")
    metadata: Metadata = Field(description="Name and labels.")
    spec: JobSpec = Field(description="What is to be done.")

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of all that can change the result: not labels, compute, metrics and what refuses splits."""
        content = self.model_dump(mode="json", by_alias=True, exclude=NO_RESULT)
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def run(self) -> str:
        """Name of the run: `<name>-<first 8 hex digits of the digest>`."""
        return f"{self.metadata.name}-{self.digest[:8]}"

    @property
    def model_name(self) -> str:
        """Name under which the model is published."""
        return self.spec.publish.name or self.metadata.name
