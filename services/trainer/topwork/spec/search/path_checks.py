"""Checks of the paths and conditions of the parameters of a search."""

import re
from collections.abc import Iterator
from itertools import combinations

from topwork.spec.job import JobSpec
from topwork.spec.loading.paths import PathError, parse_path
from topwork.spec.loading.yaml_document import Path
from topwork.spec.messages import did_you_mean, format_value
from topwork.spec.search.space import Space, conditions_of, in_template, is_same, random_combinations, values_of
from topwork.spec.spec_model import Violation

PREFIX = re.compile(r"^(spec\.)?(template\.)?(spec\.)?")
SAME_IMAGES = (
    "trials are compared on the same images. Of dataset, only imageSize, imageFit and valueRange can be parameters."
)
NO_EFFECT = "does not affect the result of training."
# Keys that cannot be parameters. `ALLOWED` are exceptions below them.
FORBIDDEN: dict[str, str] = {
    "storage": "all trials share the datasets and stages of one storage.",
    "dataset": SAME_IMAGES,
    "evaluate": NO_EFFECT,
    "publish": "only the best trial is published.",
    "compute": f"{NO_EFFECT} Of compute, only precision can be a parameter.",
    "metrics": NO_EFFECT,
    "tracking": NO_EFFECT,
    "seed": "trials with different seeds differ by chance.",
    "suspend": NO_EFFECT,
}
ALLOWED = (
    ("dataset", "imageSize"),
    ("dataset", "imageFit"),
    ("dataset", "valueRange"),
    ("compute", "precision"),
)


def check_paths(space: Space, pruned: tuple[str, ...]) -> Iterator[Violation]:
    """Check that each parameter is a key of a job that may be searched.

    Args:
        space: The space.
        pruned: Keys of the stages whose epochs the pruner decides, and that no parameter may add; empty without one.
    """
    paths: dict[str, Path] = {}
    for name in space:
        try:
            paths[name] = parse_path(name, JobSpec)
        except PathError as error:
            relative = PREFIX.sub("", name)
            hint = f" Paths start below spec.template: write {relative}." if relative != name else ""
            yield Violation(("space", name), in_template(str(error)) + hint)
            continue
        if any(paths[name][: len(allowed)] == allowed for allowed in ALLOWED):
            continue
        if reason := FORBIDDEN.get(str(paths[name][0])):
            yield Violation(("space", name), f"cannot be a parameter: {reason}")
        elif any((stage, "epochs")[: len(paths[name])] == paths[name] for stage in pruned):
            yield Violation(
                ("space", name),
                "cannot be a parameter, because the pruner decides the epochs of the last stage. Remove it, or set "
                "pruner: none.",
            )
    for (outer, outer_path), (inner, inner_path) in combinations(sorted(paths.items(), key=lambda item: item[1:]), 2):
        if inner_path[: len(outer_path)] == outer_path:
            yield Violation(("space", inner), f"is part of the parameter {outer}. Remove one of them.")


def check_conditions(space: Space) -> Iterator[Violation]:
    """Check that conditions refer to other parameters and to values that these can have."""
    for name, parameter in space.items():
        for other, value in parameter.when.items():
            path = ("space", name, "when", other)
            if other not in space:
                yield Violation(
                    path, f"is not a parameter.{did_you_mean(other, space)} Parameters: {', '.join(space)}."
                )
            elif (values := values_of(space[other])) is None:
                yield Violation(path, f"{other} is continuous. A condition requires a parameter with int or choice.")
            elif not any(is_same(value, possible) for possible in values):
                yield Violation(path, f"{format_value(value)} is not a value of {other}, so this is never met.")
            elif _depends_on(space, other, name):
                yield Violation(path, f"{other} depends on {name} itself. Remove one of the conditions.")


def check_combined_conditions(space: Space) -> Iterator[Violation]:
    """Check that all conditions of a parameter can be met at once.

    Args:
        space: A space without violations of `check_conditions`.
    """
    for name in space:
        (params,) = random_combinations(space, conditions_of(space, name), 1)
        if name not in params:
            yield Violation(("space", name, "when"), "is never met: its conditions contradict each other. Remove one.")


def _depends_on(space: Space, name: str, target: str) -> bool:
    """Return whether the conditions of a parameter refer to another one, directly or not."""
    seen, names = set[str](), [name]
    while names:
        current = names.pop()
        if current == target:
            return True
        if current in space and current not in seen:
            seen.add(current)
            names += space[current].when
    return False
