"""The base of every part of the spec: frozen, camelCase outside, unknown keys refused, with rules that cross fields."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Strict, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

# Strict: "20", 20.0 and true are no whole numbers here; whoever writes them meant something else.
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
YesNo = Annotated[bool, Strict()]


@dataclass(frozen=True)
class Meaning:
    """What a text may be, in words; messages and the reference show it instead of a pattern."""

    words: str


class Refusal(NamedTuple):
    """Why a rule refuses a part of the spec.

    Attributes:
        path: Key at fault, relative to the part, such as `optimizer.learningRate` or `steps.1.layers`.
        reason: What stands there, why that is refused, and the fix.
    """

    path: str
    reason: str


class Part(BaseModel):
    """One mapping of the job spec. Python names are snake_case, YAML keys camelCase."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=True,
        allow_inf_nan=False,
        # Each part is built when it is first used: most are only ever used inside TransferJob.
        defer_build=True,
        # An address may hold a password that somebody put there by mistake.
        hide_input_in_errors=True,
    )

    @model_validator(mode="after")
    def _keep_the_rules(self) -> Self:
        refused = [refusal for check in refusals(self) for refusal in check]
        if refused:
            words = "; ".join(f"{path}: {reason}" if path else reason for path, reason in refused)
            raise PydanticCustomError("rule", "{words}", {"words": words, "refusals": refused})
        return self


P = TypeVar("P", bound=Part)
_RULES: dict[type[Part], list[Callable[[Any], Iterator[Refusal]]]] = {}


def rule(part: type[P]) -> Callable[[Callable[[P], Iterator[Refusal]]], Callable[[P], Iterator[Refusal]]]:
    """Register a rule that crosses the fields of a part.

    A rule accepts (yields nothing) or refuses (yields one refusal a fault). It never rewrites. All rules of a part
    run, so that their refusals come at once.

    Args:
        part: The part whose fields the rule reads.

    Returns:
        A decorator that leaves the function as it is.
    """

    def register(check: Callable[[P], Iterator[Refusal]]) -> Callable[[P], Iterator[Refusal]]:
        _RULES.setdefault(part, []).append(check)
        return check

    return register


def refusals(part: Part) -> Iterator[Iterator[Refusal]]:
    """Start each rule of a part, and give its refusals."""
    return (check(part) for check in rules_of(type(part)))


def rules_of(part: type[Part]) -> tuple[Callable[[Any], Iterator[Refusal]], ...]:
    """Give the rules of a part in the order in which they run."""
    return tuple(_RULES.get(part, ()))


def named_once(key: str, words: Sequence[str]) -> Iterator[Refusal]:
    """Refuse each word of a list that stands in it before.

    Args:
        key: Key of the list.
        words: The list.

    Yields:
        One refusal for each repetition.
    """
    for index, word in enumerate(words):
        if word in words[:index]:
            yield Refusal(f"{key}.{index}", f"{word} is named twice. Take one out.")
