"""`spec.evaluate` and `spec.publish`: how good is good enough, and what is handed over."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from topwork.spec.part import Part

MetricName = Literal["accuracy", "top5", "precision", "recall", "f1", "auc", "calibrationError"]
DnsLabel = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=40)]


class Gate(Part):
    """A condition that the evaluated model must meet to be published."""

    metric: MetricName = Field(description="Metric of spec.evaluate.metrics on the test split.")
    at_least: float | None = Field(default=None, description="Least value.")
    at_most: float | None = Field(default=None, description="Greatest value.")
    at_least_latest_minus: float | None = Field(
        default=None, ge=0.0, description="Least value, as the latest published version's less this."
    )


class Evaluate(Part):
    """Evaluation on the test split."""

    metrics: tuple[MetricName, ...] = Field(
        default=("accuracy", "f1", "auc"), min_length=1, description="Metrics that are computed."
    )
    gates: tuple[Gate, ...] = Field(default=(), description="Conditions for publishing; all must hold.")


class Publish(Part):
    """What is handed over, and under which name."""

    name: DnsLabel | None = Field(default=None, description="Name of the model; without it metadata.name.")
    formats: tuple[Literal["keras", "savedModel", "tflite", "onnx"], ...] = Field(
        default=("keras", "savedModel"), min_length=1, description="Formats that are exported."
    )
