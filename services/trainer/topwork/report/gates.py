"""Checks the gates of `spec.evaluate`: conditions that a model must meet to be published."""

from collections.abc import Callable, Iterable, Mapping

from pydantic import Field

from topwork.errors import GateError
from topwork.report.evaluation import MetricsSection
from topwork.report.statistics.paired import WorseTest
from topwork.spec.evaluation import LOWER_IS_BETTER, Gate

NOT_WORSE = "notWorseThanLatest"


class GateResult(MetricsSection):
    """Result of a gate.

    Attributes:
        metric: Name of the metric.
        value: Its value; None if it is undefined on the split.
        met: Whether the gate is met.
        sentence: Explanation of the result.
    """

    metric: str
    value: float | None
    met: bool
    sentence: str


class LatestVersion(MetricsSection):
    """The latest published version, evaluated on the images on which the new model is evaluated.

    Attributes:
        version: Name of the version in explanations, such as `cats-vs-dogs/3`.
        metrics: Its metrics on these images; None if it was not evaluated.
        same_weights: Whether it is the evaluated model itself, published before.
        reason: Why it cannot be evaluated on these images, as a clause; empty if it was, or need not be.
        tests: Whether the new model is worse, by metric, for gates that ask for it.
    """

    version: str
    metrics: dict[str, float] | None = None
    same_weights: bool = False
    reason: str = ""
    tests: dict[str, WorseTest] = Field(default={}, exclude_if=lambda tests: not tests)


def check_gates(
    gates: Iterable[Gate],
    values: Mapping[str, float],
    latest: LatestVersion | None,
    undefined: Mapping[str, str] | None = None,
) -> tuple[GateResult, ...]:
    """Check all gates.

    Args:
        gates: Gates of the job.
        values: Metrics of the new model by name, without undefined ones.
        latest: The latest published version; None if there is none.
        undefined: Why a metric is undefined, by name.

    Returns:
        One result per condition, in the order of the gates.
    """
    results = []
    for gate in gates:
        value = values.get(gate.metric)
        if value is None:
            results.append(_undefined(gate.metric, undefined or {}))
            continue
        if gate.at_least is not None:
            results.append(_result(gate.metric, value, value >= gate.at_least, f"at least {gate.at_least:g}"))
        if gate.at_most is not None:
            results.append(_result(gate.metric, value, value <= gate.at_most, f"at most {gate.at_most:g}"))
        if gate.at_least_latest_minus is not None:
            results.append(_require_margin(gate.metric, value, gate.at_least_latest_minus, latest))
        if gate.not_worse_than_latest is not None:
            results.append(_require_not_worse(gate.metric, value, gate.not_worse_than_latest.confidence, latest))
    return tuple(results)


def require_gates(results: Iterable[GateResult], report_uri: str) -> None:
    """Raise an error if a gate is not met.

    Args:
        results: The results of all gates.
        report_uri: URI of the report, for the message.

    Raises:
        GateError: If at least one gate is not met. The message lists all of them with their values.
    """
    missed = [result.sentence for result in results if not result.met]
    if missed:
        raise GateError(
            f"Not published: {'; '.join(missed)}. The evaluation and the report are stored at {report_uri}. "
            "Improve the data or the training, or change spec.evaluate.gates."
        )


def _result(metric: str, value: float, met: bool, condition: str) -> GateResult:
    sentence = f"{metric} is {value:.4f}, {'and the gate requires' if met else 'but the gate requires'} {condition}"
    return GateResult(metric=metric, value=value, met=met, sentence=sentence)


def _undefined(metric: str, reasons: Mapping[str, str]) -> GateResult:
    reason = f" because {reasons[metric]}" if metric in reasons else ""
    sentence = f"{metric} is undefined on this split{reason}, so the gate is not met"
    return GateResult(metric=metric, value=None, met=False, sentence=sentence)


def _compare_with_latest(
    key: str,
    metric: str,
    value: float,
    latest: LatestVersion | None,
    check: Callable[[LatestVersion, float], tuple[bool, str]],
) -> GateResult:
    """Check a condition on the latest version and its value, unless there is nothing to compare with.

    Args:
        key: Key of the condition in the spec.
        metric: Name of the metric.
        value: Its value for the new model.
        latest: The latest version.
        check: Returns whether the condition is met, and its description.
    """
    found = f"{metric} is {value:.4f}"
    if latest is None:
        sentence = f"{found}, and there is no published version to compare with"
        return GateResult(metric=metric, value=value, met=True, sentence=sentence)
    if latest.same_weights:
        sentence = f"{found}, and {latest.version} has the same weights, so there is nothing to compare"
        return GateResult(metric=metric, value=value, met=True, sentence=sentence)
    if reason := _why_not_comparable(key, metric, latest):
        sentence = (
            f"{found}, but {key} cannot compare it with {latest.version}: {reason}. Remove {key} for this run, or "
            "publish under another name (spec.publish.name)"
        )
        return GateResult(metric=metric, value=value, met=False, sentence=sentence)
    return _result(metric, value, *check(latest, (latest.metrics or {})[metric]))


def _why_not_comparable(key: str, metric: str, latest: LatestVersion) -> str:
    if latest.metrics is None or metric not in latest.metrics:
        return latest.reason or f"its {metric} is undefined on this split"
    if key == NOT_WORSE and metric not in latest.tests:
        return f"{metric} cannot be resampled for so many images and classes"
    return ""


def _require_margin(metric: str, value: float, margin: float, latest: LatestVersion | None) -> GateResult:
    def check(latest: LatestVersion, its_value: float) -> tuple[bool, str]:
        minimum = its_value - margin
        description = f"{its_value:.4f} of {latest.version} on the same images minus {margin:g}"
        return value >= minimum, f"at least {minimum:.4f} ({description})"

    return _compare_with_latest("atLeastLatestMinus", metric, value, latest, check)


def _require_not_worse(metric: str, value: float, confidence: float, latest: LatestVersion | None) -> GateResult:
    change = "increase" if metric in LOWER_IS_BETTER else "decrease"

    def check(latest: LatestVersion, its_value: float) -> tuple[bool, str]:
        test = latest.tests[metric]
        images = f"{test.images} images"
        if test.gained is not None:
            images += f", of which {test.gained} are newly right and {test.lost} newly wrong"
        return 1 - test.p_value < confidence, (
            f"no significant {change} from {its_value:.4f} of {latest.version} on the same images "
            f"(p = {test.p_value:.2g}, confidence {confidence:g}, {images})"
        )

    return _compare_with_latest(NOT_WORSE, metric, value, latest, check)
