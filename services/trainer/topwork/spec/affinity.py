"""The shape of a pod's affinity, so that a slip is told with its line and not by the API server."""

from collections.abc import Iterator
from typing import Any

from topwork.spec.messages import hint, shown
from topwork.spec.section import Refusal

# The shape of Kubernetes' own types as plain data: a mapping of keys, a list of one shape, a mapping of texts, text, or
# a whole number. A key that must be given ends in !. (k8s.io/api/core/v1: Affinity)
REQUIRED, PREFERRED = (
    "requiredDuringSchedulingIgnoredDuringExecution",
    "preferredDuringSchedulingIgnoredDuringExecution",
)
TEXTS = {"*": str}
EXPRESSIONS = [{"key!": str, "operator!": str, "values": [str]}]
NODE_TERM = {"matchExpressions": EXPRESSIONS, "matchFields": EXPRESSIONS}
SELECTOR = {"matchLabels": TEXTS, "matchExpressions": EXPRESSIONS}
POD_TERM = {
    "topologyKey!": str,
    "labelSelector": SELECTOR,
    "namespaces": [str],
    "namespaceSelector": SELECTOR,
    "matchLabelKeys": [str],
    "mismatchLabelKeys": [str],
}
PODS = {REQUIRED: [POD_TERM], PREFERRED: [{"weight!": int, "podAffinityTerm!": POD_TERM}]}
AFFINITY = {
    "nodeAffinity": {
        REQUIRED: {"nodeSelectorTerms!": [NODE_TERM]},
        PREFERRED: [{"weight!": int, "preference!": NODE_TERM}],
    },
    "podAffinity": PODS,
    "podAntiAffinity": PODS,
}
NODE_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt")
POD_OPERATORS = NODE_OPERATORS[:4]


def wrong_affinity(affinity: dict[str, Any], path: str) -> Iterator[Refusal]:
    """Compare an affinity with what Kubernetes takes.

    Args:
        affinity: Plain data.
        path: Path of the affinity, for the refusals.

    Yields:
        One refusal for each value that the API server would not take.
    """
    for kind, value in affinity.items():
        operators = NODE_OPERATORS if kind == "nodeAffinity" else POD_OPERATORS
        yield from _compared({kind: value}, AFFINITY, path, operators)


def _compared(value: Any, shape: Any, path: str, operators: tuple[str, ...]) -> Iterator[Refusal]:
    if shape is str or shape is int:
        yield from _compared_word(value, shape, path, operators)
    elif isinstance(shape, list) and isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _compared(item, shape[0], f"{path}.{index}", operators)
    elif isinstance(shape, dict) and isinstance(value, dict):
        yield from _compared_keys(value, shape, path, operators)
    else:
        yield Refusal(
            path, f"{shown(value)} is not allowed. Allowed: {'a list' if isinstance(shape, list) else 'a mapping'}."
        )


def _compared_keys(
    value: dict[str, Any], shape: dict[str, Any], path: str, operators: tuple[str, ...]
) -> Iterator[Refusal]:
    known = {key.removesuffix("!"): inner for key, inner in shape.items()}
    for key, inner in value.items():
        if key in known or "*" in known:
            yield from _compared(inner, known.get(key, known.get("*")), f"{path}.{key}", operators)
        else:
            yield Refusal(f"{path}.{key}", f"no such key.{hint(key, known)} Known: {', '.join(known)}.")
    for key in shape:
        if key.endswith("!") and key[:-1] not in value:
            yield Refusal(path, f"has no {key[:-1]}, which Kubernetes needs here.")


def _compared_word(value: Any, shape: type, path: str, operators: tuple[str, ...]) -> Iterator[Refusal]:
    if path.endswith(".operator"):
        if value not in operators:
            yield Refusal(
                path, f"{shown(value)} is not allowed.{hint(value, operators)} Allowed: {', '.join(operators)}."
            )
    elif shape is int:
        if type(value) is not int or not 1 <= value <= 100:
            yield Refusal(path, f"{shown(value)} is not allowed. Allowed: a whole number from 1 to 100.")
    elif not isinstance(value, str):
        yield Refusal(path, f"{shown(value)} is not allowed. Allowed: text, in quotes.")
