"""CEL: rules that the API server evaluates, and expressions that format their messages as topwork formats them.

CEL is used without its optional syntax, so that every function is available in Kubernetes 1.31. The estimated cost of
an expression is limited: lists, maps and strings in a rule need a maximum length in the schema.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from topwork.spec.messages import MAX_LENGTH, join_words

Reason = Literal["FieldValueInvalid", "FieldValueForbidden", "FieldValueRequired"]


@dataclass(frozen=True)
class CelRule:
    """A rule of the API server.

    Attributes:
        violated_if: CEL expression that is true if the rule is violated. `self` is the value of the rule's model.
        message: Text of the message, or a CEL expression from `text`.
        path: Key at fault, relative to `self`; empty for `self`.
        reason: Kind of the error, which the API server shows before the message. With FieldValueDuplicate, it would
            show no message.
    """

    violated_if: str
    message: "str | Text"
    path: str = ""
    reason: Reason = "FieldValueInvalid"

    def to_validation(self, summary: str) -> dict[str, Any]:
        """Return an item of `x-kubernetes-validations`.

        Args:
            summary: Message if the API server can't evaluate the expression of the message.
        """
        validation: dict[str, Any] = {"rule": f"!({self.violated_if})"}
        if isinstance(self.message, Text):
            validation |= {"message": summary, "messageExpression": self.message.expression}
        else:
            validation |= {"message": self.message}
        if self.path:
            validation["fieldPath"] = f".{self.path}"
        return validation | ({} if self.reason == "FieldValueInvalid" else {"reason": self.reason})


@dataclass(frozen=True)
class Text:
    """A CEL expression of a text."""

    expression: str


SpecRule = Callable[[Any], Any]
"""A function with the decorator `topwork.spec.spec_model.rule`."""
RuleFactory = Callable[[], Iterator[CelRule]]
CEL_RULES: dict[SpecRule, RuleFactory] = {}
"""Function that yields the CEL rules of each rule of the spec that CEL can express."""


def mirrors(spec_rule: SpecRule) -> Callable[[RuleFactory], RuleFactory]:
    """Register a function that yields the CEL rules of a rule of the spec.

    A CEL rule must accept every object that the rule of the spec accepts, with the values of any namespace defaults.
    It may accept more: the controller checks all rules of the spec.

    Args:
        spec_rule: The rule of the spec.
    """

    def register(factory: RuleFactory) -> RuleFactory:
        CEL_RULES[spec_rule] = factory
        return factory

    return register


def text(template: str, *values: str) -> Text:
    """Build an expression of a message.

    The function format has no estimated cost. The operator + would exceed the limit: the length of string(number) is
    not known.

    Args:
        template: Text with `{}` for each value.
        values: CEL expressions of strings.

    Example:
        >>> text("{} is above epochs {}.", "string(self.views)", "string(self.epochs)").expression
        '"%s is above epochs %s.".format([string(self.views), string(self.epochs)])'
    """
    return Text(format_text(template, *values))


def format_text(template: str, *values: str) -> str:
    """Return an expression of a string with a value for each `{}`."""
    return f"{quote(template.replace('%', '%%').replace('{}', '%s'))}.format([{', '.join(values)}])"


def quote(value: str) -> str:
    """Return a string literal."""
    return json.dumps(value, ensure_ascii=False)


def any_of(values: Iterable[str]) -> str:
    """Return a list literal of strings."""
    return f"[{', '.join(map(quote, values))}]"


def format_number(number: str) -> str:
    """Return an expression that formats a floating-point number as Python does: 1.0 instead of 1."""
    whole = format_text("{}.0", f"string(int({number}))")
    return f"({number} == double(int({number})) ? {whole} : string({number}))"


def format_string(value: str) -> str:
    """Return an expression that formats a string as `topwork.spec.messages.format_value` does."""
    shortened = format_text('"{}…"', f"{value}.substring(0, {MAX_LENGTH})")
    quoted = format_text('"{}"', value)
    return f"(size({value}) > {MAX_LENGTH} ? {shortened} : {quoted})"


def exactly_one_of(keys: tuple[str, ...], unreadable: tuple[str, ...] = ()) -> Iterator[CelRule]:
    """Yield rules that exactly one of these keys of `self` is set.

    Args:
        keys: The keys.
        unreadable: Those of the keys that CEL cannot read. They may be set, too, or be the only one.
    """
    required = f"but exactly one of {join_words(list(keys))} is required."
    keys = tuple(key for key in keys if key not in unreadable)
    given = [f"has(self.{key})" for key in keys]
    count = " + ".join(f"({has} ? 1 : 0)" for has in given)
    words = []
    for index, key in enumerate(keys):
        before, after = " || ".join(given[:index]), " || ".join(given[index + 1 :])
        conjunction = f'({after} ? ", " : " and ")' if after else '" and "'
        separator = f'({before} ? {conjunction} : "") + ' if before else ""
        words.append(f'({given[index]} ? {separator}{quote(key)} : "")')
    if not unreadable:
        yield CelRule(f"{count} == 0", f"none is set, {required}", reason="FieldValueRequired")
    yield CelRule(f"{count} > 1", text(f"{{}} are set, {required}", " + ".join(words)), reason="FieldValueForbidden")


def is_set(path: str) -> str:
    """Return a condition that a key and all its parents are set.

    Example:
        >>> is_set("self.compute.gpus")
        'has(self.compute) && has(self.compute.gpus)'
    """
    root, *keys = path.split(".")
    parents = [".".join([root, *keys[: count + 1]]) for count in range(len(keys))]
    return " && ".join(f"has({parent})" for parent in parents)
