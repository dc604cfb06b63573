"""The base class of all spec models, and the registry of rules that check several fields together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class ValueDescription:
    """Annotation that describes the allowed values of a field; shown in messages and the reference instead of a regex.

    Attributes:
        text: Text after "Allowed:", such as `name[/config][:version], such as cats_vs_dogs`.
    """

    text: str


class Violation(NamedTuple):
    """A value that a rule rejects.

    Attributes:
        path: Key at fault, relative to the model of the rule, such as `optimizer.learningRate` or `steps.1.layers`. As
            a tuple if a key contains dots.
        message: The value found, why it is rejected, and how to fix it.
    """

    path: str | tuple[str | int, ...]
    message: str


class SpecModel(BaseModel):
    """One mapping of the job spec: immutable, strict about unknown keys, camelCase in YAML and snake_case in Python."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=True,
        allow_inf_nan=False,
        # Most models are used only inside TransferJob, so each validator is built on first use.
        defer_build=True,
        # A URI may contain a password by mistake.
        hide_input_in_errors=True,
    )

    @model_validator(mode="after")
    def _apply_rules(self) -> Self:
        violations = [violation for rule_violations in run_rules(self) for violation in rule_violations]
        if violations:
            text = "; ".join(f"{path}: {message}" if path else message for path, message in violations)
            raise PydanticCustomError("rule_violation", "{text}", {"text": text, "violations": violations})
        return self


M = TypeVar("M", bound=SpecModel)
_RULES: dict[type[SpecModel], list[Callable[[Any], Iterator[Violation]]]] = {}


def rule(model: type[M]) -> Callable[[Callable[[M], Iterator[Violation]]], Callable[[M], Iterator[Violation]]]:
    """Register a rule that checks several fields of a model together.

    A rule yields one violation per mistake and never changes a value. All rules of a model run, so that the user sees
    all violations at once. The reference lists each rule by its function name and docstring.

    Args:
        model: The model that the rule checks.

    Returns:
        A decorator that returns the function unchanged.

    Example:
        >>> @rule(Gate)
        ... def gate_has_a_condition(gate: Gate) -> Iterator[Violation]:
        ...     if gate.at_least is None and gate.at_most is None:
        ...         yield Violation("", "has no condition. Set atLeast or atMost.")
    """

    def register(check: Callable[[M], Iterator[Violation]]) -> Callable[[M], Iterator[Violation]]:
        _RULES.setdefault(model, []).append(check)
        return check

    return register


def run_rules(model: SpecModel) -> Iterator[Iterator[Violation]]:
    """Start each rule of a model and yield its violations as one iterator per rule."""
    return (check(model) for check in get_rules(type(model)))


def get_rules(model: type[SpecModel]) -> tuple[Callable[[Any], Iterator[Violation]], ...]:
    """Return the rules of a model in the order in which they run."""
    return tuple(_RULES.get(model, ()))


def check_unique(key: str, items: Sequence[str]) -> Iterator[Violation]:
    """Reject items that occur more than once in a list.

    Args:
        key: Key of the list.
        items: The list.

    Yields:
        One violation for each repetition.
    """
    for index, item in enumerate(items):
        if item in items[:index]:
            yield Violation(f"{key}.{index}", f"{item} is listed twice. Remove one of them.")
