"""The conditions of a TransferJob or a TransferSearch, for `kubectl wait` and the health checks of GitOps tools."""

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple, get_args

from topwork.cluster.transfer_job_status import Condition, ConditionedStatus, ConditionType, State

MAX_MESSAGE_CHARACTERS = 32_000
"""The API server allows 32,768 characters in the message of a condition."""
CUT = "… (cut)"


class Fact(NamedTuple):
    """Reason and message of a condition, and whether it holds."""

    reason: str
    message: str = ""
    holds: bool = True


ACCEPTED = Fact("Valid")


def update_conditions(
    previous: ConditionedStatus, state: State, facts: Mapping[ConditionType, Fact], generation: int, now: datetime
) -> tuple[Condition, ...]:
    """Return all conditions of a TransferJob or a TransferSearch.

    Args:
        previous: The last status. A condition keeps the time of its last transition until its status changes.
        state: State of the run, which is the reason of conditions that do not hold.
        facts: Facts about conditions. Accepted holds by default, and the others do not.
        generation: Generation of the spec.
        now: Current time.

    Returns:
        The conditions.
    """
    defaults: dict[ConditionType, Fact] = {"Accepted": ACCEPTED}
    return tuple(
        _update(previous, kind, facts.get(kind, defaults.get(kind, Fact(state, holds=False))), generation, now)
        for kind in get_args(ConditionType)
    )


def _update(previous: ConditionedStatus, kind: ConditionType, fact: Fact, generation: int, now: datetime) -> Condition:
    before = previous.condition(kind)
    status = "True" if fact.holds else "False"
    return Condition(
        type=kind,
        status=status,
        reason=fact.reason,
        message=limit_text(fact.message, MAX_MESSAGE_CHARACTERS),
        last_transition_time=before.last_transition_time if before and before.status == status else now,
        observed_generation=generation,
    )


def limit_text(text: str, length: int) -> str:
    """Cut a text of one or several lines, and say so at its end."""
    return text if len(text) <= length else f"{text[: length - len(CUT)]}{CUT}"
