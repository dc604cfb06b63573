"""`spec.evaluate` and `spec.publish`: metrics, gates and the formats of the published model."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictFloat

from topwork.spec.kubernetes_types import DnsLabel
from topwork.spec.messages import format_value
from topwork.spec.spec_model import SpecModel, Violation, check_unique, rule

MetricName = Literal["accuracy", "top5", "precision", "recall", "f1", "auc", "calibrationError"]
LOWER_IS_BETTER = frozenset({"loss", "calibrationError"})
Fraction = Annotated[StrictFloat, Field(ge=0.0, le=1.0)]


class NotWorse(SpecModel):
    """A statistical comparison with the latest published version on the same test images."""

    confidence: Annotated[StrictFloat, Field(gt=0.5, lt=1.0)] = Field(
        default=0.95,
        description="Confidence level, as a fraction. The gate fails if the model is worse than the latest version "
        "with at least this confidence.",
    )


class Gate(SpecModel):
    """A condition that the evaluated model must meet before it is published."""

    metric: MetricName = Field(
        description="Metric to check. Must be listed in spec.evaluate.metrics; measured on the test split."
    )
    at_least: Fraction | None = Field(
        default=None, description="Minimum value, as a fraction from 0 to 1 (0.95 is 95 %)."
    )
    at_most: Fraction | None = Field(default=None, description="Maximum value, as a fraction from 0 to 1.")
    at_least_latest_minus: Fraction | None = Field(
        default=None,
        description="Largest allowed decrease compared to the latest published version, as a fraction from 0 to 1.",
    )
    not_worse_than_latest: NotWorse | None = Field(
        default=None,
        description="Fails if the model is significantly worse than the latest published version on the same test "
        "images (paired test).",
    )

    @property
    def compares_with_latest(self) -> bool:
        """Whether the latest published version has to be evaluated, too."""
        return self.at_least_latest_minus is not None or self.not_worse_than_latest is not None


class Evaluate(SpecModel):
    """Evaluation on the test split, or on the validation split if there is no test split."""

    metrics: tuple[MetricName, ...] = Field(
        default=("accuracy", "f1", "auc"), min_length=1, max_length=7, description="Metrics to compute."
    )
    gates: tuple[Gate, ...] = Field(
        default=(),
        max_length=50,
        description="Conditions that the model must meet to be published. If one fails, the run ends with exit code 3.",
    )
    calibration: Literal["none", "temperature"] = Field(
        default="none",
        description="Calibration of the predicted probabilities. temperature divides the logits by a number that is "
        "fitted on the validation split; accuracy does not change.",
    )


class Publish(SpecModel):
    """Whether, under which name and in which formats the model is published."""

    enabled: StrictBool = Field(
        default=True,
        description="Whether to evaluate the model on the test split and publish it. false: the run ends after "
        "training, with the metrics on the validation split.",
    )
    name: DnsLabel | None = Field(
        default=None, description="Name of the model in the registry. Unset: the value of metadata.name."
    )
    formats: tuple[Literal["keras", "savedModel", "tflite", "onnx"], ...] = Field(
        default=("keras", "savedModel"), min_length=1, max_length=4, description="Formats to export the model to."
    )
    fold: Literal["all"] | None = Field(
        default=None,
        description="What cross-validation publishes. all: a final model that is trained on all images, with the "
        "metrics of cross-validation. Unset: nothing.",
    )


@rule(Gate)
def gate_has_a_condition(gate: Gate) -> Iterator[Violation]:
    """A gate without a condition always passes."""
    conditions = (gate.at_least, gate.at_most, gate.at_least_latest_minus, gate.not_worse_than_latest)
    if all(condition is None for condition in conditions):
        yield Violation(
            "", "has no condition. Set at least one of atLeast, atMost, atLeastLatestMinus and notWorseThanLatest."
        )


@rule(Gate)
def gate_can_be_met(gate: Gate) -> Iterator[Violation]:
    """No value can be above the maximum and below the minimum at the same time."""
    if gate.at_least is not None and gate.at_most is not None and gate.at_least > gate.at_most:
        yield Violation(
            "atMost",
            f"{format_value(gate.at_most)} is below atLeast {format_value(gate.at_least)}, so no model can meet both. "
            "Swap or change them.",
        )


@rule(Gate)
def calibration_error_has_only_a_maximum(gate: Gate) -> Iterator[Violation]:
    """A lower calibration error is better, so a minimum would publish only bad models."""
    if gate.metric == "calibrationError":
        for key, value in (("atLeast", gate.at_least), ("atLeastLatestMinus", gate.at_least_latest_minus)):
            if value is not None:
                yield Violation(
                    key,
                    f"{format_value(value)} requires a high calibrationError, but lower is better. Use atMost.",
                )


@rule(Evaluate)
def gate_metrics_are_computed(evaluate: Evaluate) -> Iterator[Violation]:
    """A gate on a metric that is not computed could never be met."""
    for index, gate in enumerate(evaluate.gates):
        if gate.metric not in evaluate.metrics:
            yield Violation(
                f"gates.{index}.metric",
                f"{gate.metric} is not in spec.evaluate.metrics: {', '.join(evaluate.metrics)}. Add it there.",
            )


@rule(Evaluate)
def metrics_are_unique(evaluate: Evaluate) -> Iterator[Violation]:
    """A repeated metric is probably a typo for another one."""
    yield from check_unique("metrics", evaluate.metrics)


@rule(Publish)
def formats_are_unique(publish: Publish) -> Iterator[Violation]:
    """A repeated format is probably a typo for another one."""
    yield from check_unique("formats", publish.formats)
