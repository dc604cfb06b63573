"""Checks the gates of `spec.evaluate`: conditions that a model must meet to be published."""

from collections.abc import Iterable, Mapping

from topwork.errors import GateError
from topwork.report.evaluation import MetricsSection
from topwork.spec.evaluation import Gate


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


def check_gates(
    gates: Iterable[Gate], values: Mapping[str, float], latest: Mapping[str, float] | None, latest_name: str = ""
) -> tuple[GateResult, ...]:
    """Check all gates.

    Args:
        gates: Gates of the job.
        values: Metrics of the new model by name, without undefined ones.
        latest: Metrics of the latest published version; None if there is none.
        latest_name: Name of that version in explanations, such as `cats-vs-dogs/3`.

    Returns:
        One result per condition, in the order of the gates.
    """
    results = []
    for gate in gates:
        value = values.get(gate.metric)
        if value is None:
            results.append(_undefined(gate.metric))
            continue
        if gate.at_least is not None:
            results.append(_result(gate.metric, value, value >= gate.at_least, f"at least {gate.at_least:g}"))
        if gate.at_most is not None:
            results.append(_result(gate.metric, value, value <= gate.at_most, f"at most {gate.at_most:g}"))
        if gate.at_least_latest_minus is not None:
            results.append(_compare_with_latest(gate.metric, value, gate.at_least_latest_minus, latest, latest_name))
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


def _undefined(metric: str) -> GateResult:
    sentence = f"{metric} is undefined on this split because fewer than two classes occur, so the gate is not met"
    return GateResult(metric=metric, value=None, met=False, sentence=sentence)


def _compare_with_latest(
    metric: str, value: float, margin: float, latest: Mapping[str, float] | None, latest_name: str
) -> GateResult:
    if latest is None:
        sentence = f"{metric} is {value:.4f}, and there is no published version to compare with"
        return GateResult(metric=metric, value=value, met=True, sentence=sentence)
    if metric not in latest:
        sentence = f"{metric} is {value:.4f}, but {latest_name} has no {metric} to compare with"
        return GateResult(metric=metric, value=value, met=False, sentence=sentence)
    minimum = latest[metric] - margin
    condition = f"at least {minimum:.4f} ({latest[metric]:.4f} of {latest_name} minus {margin:g})"
    return _result(metric, value, value >= minimum, condition)
