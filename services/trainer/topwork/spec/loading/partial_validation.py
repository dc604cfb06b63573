"""Runs the rules of a spec that has other errors, so that the user sees all problems at once.

Pydantic skips the rules of a model if one of its fields is invalid. This module runs those rules on a model without the
invalid fields.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, cast

from pydantic import TypeAdapter, ValidationError

from topwork.spec.schema import key_types
from topwork.spec.spec_model import SpecModel, Violation, run_rules

Path = tuple[str | int, ...]


class SkippedViolation(NamedTuple):
    """A violation of a rule that pydantic skipped, with the path of the rule's model."""

    path: Path
    violation: Violation


def run_skipped_rules(root: type[SpecModel], data: Mapping[str, Any], error: ValidationError) -> list[SkippedViolation]:
    """Run the rules that pydantic skipped because of other errors in the same model.

    Args:
        root: Model that `data` was validated against.
        data: The validated data, with YAML keys.
        error: The errors that pydantic reported.

    Returns:
        Violations of those rules that do not read an invalid value.
    """
    validation = _PartialValidation(error)
    validation.build(root, data, ())
    return validation.violations


class _PartialValidation:
    """Builds models without their invalid fields. A rule that reads an invalid field raises AttributeError."""

    def __init__(self, error: ValidationError) -> None:
        details = error.errors(include_url=False, include_input=False)
        self._invalid = {_without_tags(detail["loc"]) for detail in details if detail["type"] != "rule_violation"}
        self._checked = {_without_tags(detail["loc"]) for detail in details if detail["type"] == "rule_violation"}
        self.violations: list[SkippedViolation] = []

    def build(self, model: type[SpecModel], data: Mapping[str, Any], path: Path) -> SpecModel:
        names = {field.alias or name: name for name, field in model.model_fields.items()}
        values = dict(self._valid_values(model, data, path))
        instance = model.model_construct(**{names[key]: value for key, value in values.items()})
        for key in data.keys() & names.keys() - values.keys():
            instance.__dict__.pop(names[key], None)
        if path not in self._checked:
            self.violations += [SkippedViolation(path, violation) for violation in self._run_rules(instance)]
        return instance

    def _valid_values(self, model: type[SpecModel], data: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
        for key, field in key_types.fields_by_key(model).items():
            child = (*path, key)
            if key not in data or child in self._invalid:
                continue
            if not any(location[: len(child)] == child for location in self._invalid | self._checked):
                # The value is valid; this only converts lists to tuples and mappings to models.
                yield key, _adapter(model, key).validate_python(data[key], by_alias=True, by_name=False)
                continue
            models = [
                key_type.python_type
                for key_type in key_types.expand_types(field.annotation)
                if key_types.is_model(key_type.python_type)
            ]
            if len(models) == 1 and isinstance(data[key], Mapping):
                yield key, self.build(models[0], data[key], child)

    def _run_rules(self, instance: SpecModel) -> Iterator[Violation]:
        for violations in run_rules(instance):
            try:
                yield from violations
            except AttributeError:
                # The rule reads an invalid value, which is already reported.
                continue


@cache
def _adapter(model: type[SpecModel], key: str) -> TypeAdapter[Any]:
    """Return the validator of a field; building one takes longer than all rules."""
    return TypeAdapter(cast("Any", key_types.fields_by_key(model)[key].annotation))


def _without_tags(path: Path) -> Path:
    return tuple(step for step in path if not (isinstance(step, str) and step.startswith("<")))
