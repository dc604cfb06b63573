"""The gates of `spec.evaluate`: what a model must reach before anyone can see it."""

from collections.abc import Iterable, Mapping

from topwork.errors import GateError
from topwork.report.evaluation import Figures
from topwork.spec.evaluation import Gate


class GateOutcome(Figures):
    """Whether a gate holds, with the sentence that says why."""

    metric: str
    value: float | None
    met: bool
    sentence: str


def gate_outcomes(
    gates: Iterable[Gate], values: Mapping[str, float], latest: Mapping[str, float] | None, latest_name: str = ""
) -> tuple[GateOutcome, ...]:
    """Check every gate, whether or not one before it holds.

    Args:
        gates: Gates of the job.
        values: Metrics of the new model by name; one that is not defined on its split is left out.
        latest: Metrics of the latest published version; None where there is none yet.
        latest_name: How sentences call that version, such as `cats-vs-dogs/3`.

    Returns:
        One outcome for each condition, in the order of the gates.
    """
    outcomes = []
    for gate in gates:
        value = values.get(gate.metric)
        if value is None:
            outcomes.append(_undefined(gate.metric))
            continue
        if gate.at_least is not None:
            outcomes.append(_outcome(gate.metric, value, value >= gate.at_least, f"at least {gate.at_least:g}"))
        if gate.at_most is not None:
            outcomes.append(_outcome(gate.metric, value, value <= gate.at_most, f"at most {gate.at_most:g}"))
        if gate.at_least_latest_minus is not None:
            outcomes.append(_against_latest(gate.metric, value, gate.at_least_latest_minus, latest, latest_name))
    return tuple(outcomes)


def require_gates(outcomes: Iterable[GateOutcome], where: str) -> None:
    """Refuse a model that misses a gate.

    Args:
        outcomes: The outcomes of all gates.
        where: Address of the report, for the message.

    Raises:
        GateError: If at least one gate is not met; it names all of them with their values.
    """
    missed = [outcome.sentence for outcome in outcomes if not outcome.met]
    if missed:
        raise GateError(
            f"Not published: {'; '.join(missed)}. The evaluation and the report are kept at {where}. "
            "Improve the data or the training, or change spec.evaluate.gates."
        )


def _outcome(metric: str, value: float, met: bool, wanted: str) -> GateOutcome:
    sentence = f"{metric} is {value:.4f}, {'which is' if met else 'but the gate asks for'} {wanted}"
    return GateOutcome(metric=metric, value=value, met=met, sentence=sentence)


def _undefined(metric: str) -> GateOutcome:
    sentence = f"{metric} is not defined on this split, where fewer than two classes occur, so its gate can't hold"
    return GateOutcome(metric=metric, value=None, met=False, sentence=sentence)


def _against_latest(
    metric: str, value: float, margin: float, latest: Mapping[str, float] | None, latest_name: str
) -> GateOutcome:
    if latest is None:
        sentence = f"{metric} is {value:.4f}, and no version is published yet that it could fall behind"
        return GateOutcome(metric=metric, value=value, met=True, sentence=sentence)
    if metric not in latest:
        sentence = f"{metric} is {value:.4f}, but {latest_name} has no {metric} to compare it with"
        return GateOutcome(metric=metric, value=value, met=False, sentence=sentence)
    least = latest[metric] - margin
    wanted = f"at least {least:.4f} ({latest_name} has {latest[metric]:.4f}, less {margin:g})"
    return _outcome(metric, value, value >= least, wanted)
