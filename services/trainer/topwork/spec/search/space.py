"""The space of a TransferSearch: which parameters apply, which combinations there are, and the spec of a trial."""

import math
import random
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from topwork.spec.job import JobSpec
from topwork.spec.loading.paths import PathError, parse_path, set_value
from topwork.spec.loading.problems import Finding, InvalidSpecError, Problem, explain_errors, format_path
from topwork.spec.loading.yaml_document import Path
from topwork.spec.schema import key_types

if TYPE_CHECKING:
    from topwork.spec.search.transfer_search import Parameter, TransferSearch

Params = Mapping[str, Any]
"""Value of each parameter of a trial, by its path. Parameters whose condition is not met are missing."""
Space = Mapping[str, "Parameter"]
KEY_OF_A_JOB = re.compile(rf"\bspec\.({'|'.join(key_types.fields_by_key(JobSpec))})\b")


class RefusedError(Exception):
    """The spec refuses a combination of values.

    Attributes:
        findings: Each problem; paths are relative to the spec of the trial.
    """

    def __init__(self, findings: tuple[Finding, ...]) -> None:
        super().__init__("; ".join(f"{format_path(finding.path)}: {finding.message}" for finding in findings))
        self.findings = findings


def trial_spec(search: "TransferSearch", params: Params, epochs: int | None = None) -> JobSpec:
    """Return the spec of a trial: the template with the values of its parameters.

    Args:
        search: The search.
        params: Value of each parameter that applies. A section replaces the one of the template; None removes a key.
        epochs: Number of epochs of the last stage if the trial may be continued later: it keeps its checkpoint. None
            for all epochs.

    Returns:
        A validated spec. It publishes as the template does.

    Raises:
        InvalidSpecError: If the spec refuses the combination of values, with the path and reason of each problem.

    Example:
        >>> trial_spec(search, {"transfer.optimizer.learningRate": 0.003}).transfer.optimizer.learning_rate
        0.003
    """
    if epochs is not None:
        params = {**params, f"{last_stage(search.spec.template)}.epochs": epochs, "compute.keepCheckpoint": True}
    try:
        return set_parameters(search.spec.template, params)
    except RefusedError as error:
        raise InvalidSpecError(
            tuple(Problem("", 0, 0, format_path(("spec", *path)), message) for path, message, _ in error.findings)
        ) from None


def set_parameters(template: JobSpec, params: Params) -> JobSpec:
    """Return the template with the values of some parameters.

    Raises:
        RefusedError: If the spec refuses the combination of values.
    """
    # A template with other errors, which are reported, too, lacks the invalid values.
    data = template.model_dump(mode="json", by_alias=True, exclude_unset=True, warnings=False)
    for name, value in params.items():
        path = parse_path(name, JobSpec)
        _remove_short_form(data, path)
        try:
            set_value(data, path, value, "the template")
        except PathError as error:
            raise RefusedError((Finding(error.path, str(error)),)) from None
    try:
        return JobSpec.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        raise RefusedError(tuple(explain_errors(error, data, JobSpec))) from None


def _remove_short_form(data: dict[str, Any], path: Path) -> None:
    """Remove a default in short form, such as `unfreeze: all`, above the key: the API server writes out defaults."""
    node: Any = data
    for depth, step in enumerate(path[:-1]):
        if isinstance(node, dict) and isinstance(node.get(step), str) and node[step] == _default(path[: depth + 1]):
            del node[step]
            return
        try:
            node = node[step]
        except (KeyError, IndexError, TypeError):
            return


def _default(path: Path) -> Any:
    for key_type in key_types.types_at(JobSpec, path[:-1]):
        if key_types.is_model(key_type.python_type) and (
            field := key_types.fields_by_key(key_type.python_type).get(str(path[-1]))
        ):
            return field.default
    return None


def name_template_keys(finding: Finding) -> Finding:
    """Replace `spec.transfer` by `spec.template.transfer` and so on in the message about a key of the template."""
    if finding.path[:2] != ("spec", "template"):
        return finding
    return finding._replace(message=in_template(finding.message))


def in_template(message: str) -> str:
    """Replace the paths of keys of a job in a message by those of the template of a search."""
    return KEY_OF_A_JOB.sub(r"spec.template.\1", message)


def last_stage(spec: JobSpec) -> Literal["transfer", "fineTune"]:
    """Return the key of the last training stage, whose epochs a pruner limits."""
    return "transfer" if spec.fine_tune is None else "fineTune"


def is_active(parameter: "Parameter", params: Params) -> bool:
    """Return whether all conditions of a parameter are met.

    Args:
        parameter: The parameter.
        params: Values of the parameters that it depends on, as far as they apply.

    Returns:
        False also if a parameter that it depends on does not apply.
    """
    return all(other in params and is_same(params[other], value) for other, value in parameter.when.items())


def is_same(left: Any, right: Any) -> bool:
    """Return whether two values of a spec are equal: 1 equals 1.0, but not true."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(is_same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(is_same, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def conditions_of(space: Space, name: str) -> dict[str, Any]:
    """Return the values that meet the conditions of a parameter, and of those that it depends on."""
    fixed: dict[str, Any] = {}
    for other, value in space[name].when.items():
        fixed |= conditions_of(space, other) | {other: value}
    return fixed


def ordered_parameters(space: Space) -> list[tuple[str, "Parameter"]]:
    """Return the parameters of a space such that each follows those that its conditions refer to.

    Args:
        space: A space without cycles.
    """
    ordered: dict[str, Parameter] = {}

    def add(name: str) -> None:
        for other in space[name].when:
            if other not in ordered:
                add(other)
        ordered.setdefault(name, space[name])

    for name in space:
        add(name)
    return list(ordered.items())


def values_of(parameter: "Parameter") -> tuple[Any, ...] | range | None:
    """Return all values of a parameter in order; None if there are infinitely many."""
    if parameter.choice is not None:
        return parameter.choice
    return None if parameter.int is None else range(parameter.int[0], parameter.int[1] + 1)


def combinations(space: Space) -> Iterator[dict[str, Any]]:
    """Yield each combination of values once, in a fixed order.

    Args:
        space: A space whose parameters are all `int` or `choice`.
    """
    parameters = ordered_parameters(space)

    def extend(index: int, params: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if index == len(parameters):
            yield params
            return
        name, parameter = parameters[index]
        if not is_active(parameter, params):
            yield from extend(index + 1, params)
            return
        for value in values_of(parameter) or ():
            yield from extend(index + 1, {**params, name: value})

    yield from extend(0, {})


def count_combinations(space: Space, limit: int) -> int | None:
    """Count the combinations of a space, up to a limit; None if there are infinitely many."""
    if any(values_of(parameter) is None for parameter in space.values()):
        return None
    return sum(1 for _ in islice(combinations(space), limit))


def draw_parameters(space: Space, generator: random.Random, fixed: Params | None = None) -> dict[str, Any]:
    """Draw a random value for each parameter that applies.

    Args:
        space: The space.
        generator: Source of randomness.
        fixed: Values that are not drawn, such as those of one parameter and of its conditions.
    """
    params: dict[str, Any] = {}
    for name, parameter in ordered_parameters(space):
        if is_active(parameter, params):
            params[name] = fixed[name] if fixed and name in fixed else _draw_value(parameter, generator)
    return params


def random_combinations(space: Space, fixed: Params, count: int) -> Iterator[dict[str, Any]]:
    """Yield random combinations of a valid space, the same ones each time. `fixed` is as in `draw_parameters`."""
    generator = random.Random(0)  # noqa: S311 - not for cryptography
    return (draw_parameters(space, generator, fixed) for _ in range(count))


def _draw_value(parameter: "Parameter", generator: random.Random) -> Any:
    if (values := values_of(parameter)) is not None:
        return generator.choice(values)
    if parameter.uniform is not None:
        return generator.uniform(*parameter.uniform)
    low, high = parameter.log_uniform or (1.0, 1.0)
    # Rounding must not leave the bounds.
    return min(max(math.exp(generator.uniform(math.log(low), math.log(high))), low), high)
