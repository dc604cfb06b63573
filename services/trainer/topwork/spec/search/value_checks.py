"""Checks of the values of a search: which bounds, choices and combinations the spec of a job accepts."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from topwork.spec.job import JobSpec
from topwork.spec.loading.paths import parse_path
from topwork.spec.loading.problems import format_path
from topwork.spec.loading.yaml_document import Path
from topwork.spec.messages import format_value
from topwork.spec.schema import key_types
from topwork.spec.search.space import (
    Params,
    RefusedError,
    Space,
    conditions_of,
    count_combinations,
    in_template,
    last_stage,
    random_combinations,
    set_parameters,
)
from topwork.spec.spec_model import Violation

if TYPE_CHECKING:
    from topwork.spec.search.transfer_search import SearchSpec

SAMPLES = 200
# Combinations that are tried before a value counts as refused in every combination.
ATTEMPTS = 30
MAX_COUNT = 10_000
"""Up to this number, the combinations of a grid are counted."""


class Candidate(NamedTuple):
    """A bound or choice of a parameter.

    Attributes:
        name: Name of the parameter.
        path: Path of the value, relative to the spec of the search.
        value: The value.
        fixed: This value, and those of the conditions of its parameter.
    """

    name: str
    path: Path
    value: Any
    fixed: dict[str, Any]


def check_values(template: JobSpec, space: Space) -> Iterator[Violation]:
    """Check that the template accepts each bound and choice in at least one combination with other parameters.

    Args:
        template: The template.
        space: A space without violations of `check_paths` and `check_conditions`.
    """
    refused = False
    for candidate in candidates(space):
        if refusal := _refusal_of_all(template, _combinations_with(space, candidate.fixed)):
            refused = True
            yield _explain_refusal(candidate, refusal)
    if not refused and (refusal := _refusal_of_all(template, random_combinations(space, {}, SAMPLES))):
        message = in_template(refusal.findings[0].message)
        yield Violation("space", f"all of {SAMPLES} random combinations are refused. The first reason: {message}")


def _refusal_of_all(template: JobSpec, attempts: Iterable[Params]) -> RefusedError | None:
    """Return why the template refuses the first of some combinations; None if it accepts one of them."""
    first: RefusedError | None = None
    for params in attempts:
        try:
            set_parameters(template, params)
        except RefusedError as error:
            first = first or error
        else:
            return None
    return first


def _combinations_with(space: Space, fixed: Params) -> Iterator[Params]:
    """Yield some combinations that contain these values."""
    yield fixed
    for index in (0, -1):
        corner = {name: values[index] for name, parameter in space.items() for values in parameter.kinds.values()}
        yield from random_combinations(space, {**corner, **fixed}, 1)
    yield from random_combinations(space, fixed, ATTEMPTS)


def candidates(space: Space) -> Iterator[Candidate]:
    """Yield each bound and choice of each parameter."""
    for name, parameter in space.items():
        for kind, values in parameter.kinds.items():
            for index, value in enumerate(values):
                fixed = conditions_of(space, name) | {name: value}
                yield Candidate(name, ("space", name, kind, index), value, fixed)


def _explain_refusal(candidate: Candidate, refusal: RefusedError) -> Violation:
    path = parse_path(candidate.name, JobSpec)
    finding = min(refusal.findings, key=lambda finding: finding.path[: len(path)] != path)
    message = in_template(finding.message)
    if finding.path[: len(path)] == path:
        return Violation((*candidate.path, *finding.path[len(path) :]), f"{message}{_other_kind(candidate, path)}")
    return Violation(
        candidate.path,
        f"{format_value(candidate.value)} is refused. {format_path(('spec', 'template', *finding.path))}: {message}",
    )


def _other_kind(candidate: Candidate, path: Path) -> str:
    types = {key_type.python_type for key_type in key_types.types_at(JobSpec, path)}
    is_continuous = candidate.path[2] in {"uniform", "logUniform"}
    return " Use int." if is_continuous and int in types and float not in types else ""


def check_continuation(template: JobSpec, space: Space, pruner: str) -> Iterator[Violation]:
    """Check that all trials can be continued with more epochs.

    Args:
        template: The template.
        space: A valid space.
        pruner: Name of the pruner.
    """
    stage, settings = f"spec.template.{last_stage(template)}", template.fine_tune or template.transfer
    if settings.epochs is not None and settings.epochs < 2:
        yield Violation(
            "pruner",
            f"{pruner} stops bad trials before their last epoch, but {stage}.epochs is {settings.epochs}. Set more "
            "epochs, or pruner: none.",
        )
    for source, spec in _specs(template, space):
        settings = spec.fine_tune or spec.transfer
        if settings.optimizer.schedule.name == "cosine":
            reason = (
                f"the schedule cosine of {source or f'{stage}.optimizer.schedule'} depends on the number of epochs. "
                "Use constant, exponential, step or inverseTime"
            )
        elif settings.epochs is None:
            reason = f"{source or f'{stage}.unfreeze'} has steps with their own epochs. Unfreeze all layers at once"
        else:
            continue
        yield Violation("pruner", f"{pruner} continues trials with more epochs, but {reason}, or set pruner: none.")
        return


def _specs(template: JobSpec, space: Space) -> Iterator[tuple[str, JobSpec]]:
    """Yield the template, and the template with each bound or choice that it accepts, with the path of the value."""
    yield "", template
    for candidate in candidates(space):
        try:
            yield format_path(("spec", *candidate.path)), set_parameters(template, candidate.fixed)
        except RefusedError:
            continue


def search_warnings(search: "SearchSpec") -> Iterator[str]:
    """Yield what is probably not intended in a valid search.

    Args:
        search: The spec of the search.

    Yields:
        A warning about combinations that the spec of a job refuses, and one about those that a grid does not reach.
    """
    refused, first = 0, ""
    for params in random_combinations(search.space, {}, SAMPLES):
        try:
            set_parameters(search.template, params)
        except RefusedError as error:
            refused += 1
            path, message, _ = error.findings[0]
            first = first or f"{format_path(('spec', 'template', *path))}: {in_template(message)}"
    if refused:
        yield (
            f"spec.space: {refused} of {SAMPLES} random combinations are refused. Such trials fail at once, but count. "
            f"The first reason: {first}"
        )
    count = count_combinations(search.space, MAX_COUNT) if search.sampler == "grid" else None
    if count and count > search.trials:
        number = f"at least {count}" if count == MAX_COUNT else count
        yield f"spec.trials: {search.trials} trials do not cover the grid of {number} combinations. Raise trials."
