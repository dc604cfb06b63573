"""`spec.evaluate` and `spec.publish`: how good is good enough, and what is handed over."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from topwork.spec.messages import shown
from topwork.spec.section import Meaning, Number, Part, Refusal, named_once, rule

MetricName = Literal["accuracy", "top5", "precision", "recall", "f1", "auc", "calibrationError"]
DnsLabel = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=40),
    Meaning("a DNS-1123 label: a-z, 0-9 and dash, first and last no dash, at most 40 characters"),
]
Share = Annotated[Number, Field(ge=0.0, le=1.0)]


class Gate(Part):
    """A condition that the evaluated model must meet to be published."""

    metric: MetricName = Field(description="Metric of spec.evaluate.metrics on the test split.")
    at_least: Share | None = Field(default=None, description="Least value, as a share: 0.95 is 95 %.")
    at_most: Share | None = Field(default=None, description="Greatest value, as a share.")
    at_least_latest_minus: Share | None = Field(
        default=None, description="Least value, as the latest published version's less this."
    )


class Evaluate(Part):
    """Evaluation on the test split, or on validation where there is no test split."""

    metrics: tuple[MetricName, ...] = Field(
        default=("accuracy", "f1", "auc"), min_length=1, description="Metrics that are computed."
    )
    gates: tuple[Gate, ...] = Field(default=(), max_length=50, description="Conditions for publishing; all must hold.")


class Publish(Part):
    """What is handed over, and under which name."""

    name: DnsLabel | None = Field(default=None, description="Name of the model; without it metadata.name.")
    formats: tuple[Literal["keras", "savedModel", "tflite", "onnx"], ...] = Field(
        default=("keras", "savedModel"), min_length=1, description="Formats that are exported."
    )


@rule(Gate)
def gate_has_a_condition(gate: Gate) -> Iterator[Refusal]:
    """A gate without a condition always stands open."""
    if gate.at_least is None and gate.at_most is None and gate.at_least_latest_minus is None:
        yield Refusal("", "has no condition. Give at least one of atLeast, atMost and atLeastLatestMinus.")


@rule(Gate)
def gate_can_be_met(gate: Gate) -> Iterator[Refusal]:
    """No value is above and below at once."""
    if gate.at_least is not None and gate.at_most is not None and gate.at_least > gate.at_most:
        yield Refusal(
            "atMost", f"{shown(gate.at_most)} is below atLeast {shown(gate.at_least)}. No model can meet both."
        )


@rule(Gate)
def gate_looks_the_right_way(gate: Gate) -> Iterator[Refusal]:
    """A small calibration error is good, so that a least value would publish bad models only."""
    if gate.metric == "calibrationError":
        for key, value in (("atLeast", gate.at_least), ("atLeastLatestMinus", gate.at_least_latest_minus)):
            if value is not None:
                yield Refusal(key, f"{shown(value)} asks for a large calibrationError, but small is good. Use atMost.")


@rule(Evaluate)
def gates_are_evaluated(evaluate: Evaluate) -> Iterator[Refusal]:
    """A gate on a metric that nobody computes could never be met."""
    for index, gate in enumerate(evaluate.gates):
        if gate.metric not in evaluate.metrics:
            yield Refusal(
                f"gates.{index}.metric",
                f"{gate.metric} is not among spec.evaluate.metrics: {', '.join(evaluate.metrics)}. Add it there.",
            )


@rule(Evaluate)
def metrics_arenamed_once(evaluate: Evaluate) -> Iterator[Refusal]:
    """A word that stands twice is a slip for another."""
    yield from named_once("metrics", evaluate.metrics)


@rule(Publish)
def formats_arenamed_once(publish: Publish) -> Iterator[Refusal]:
    """As with the metrics."""
    yield from named_once("formats", publish.formats)
