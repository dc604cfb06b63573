"""Kubernetes value types in the spec: names, labels, quantities, tolerations and affinity.

Values are validated as the API server validates them, so that a mistake is reported with its line before submission.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import StringConstraints

from topwork.spec.messages import did_you_mean, format_value
from topwork.spec.spec_model import ValueDescription, Violation

DnsLabel = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=40),
    ValueDescription(
        "a DNS-1123 label: a-z, 0-9 and hyphen, starting and ending with a letter or digit, at most 40 characters"
    ),
]
# RFC 1123 subdomain as Kubernetes validates it: no label between two dots is empty or starts or ends with a hyphen.
SUBDOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
DnsName = Annotated[
    str,
    StringConstraints(pattern=f"^{SUBDOMAIN}$", max_length=63),
    ValueDescription("a Kubernetes name: a-z, 0-9, hyphen and dot, at most 63 characters"),
]
ObjectName = Annotated[
    str,
    StringConstraints(pattern=f"^{SUBDOMAIN}$", max_length=253),
    ValueDescription("the name of a Kubernetes object: a-z, 0-9, hyphen and dot, at most 253 characters"),
]
QUALIFIED_NAME = StringConstraints(
    pattern=rf"^({SUBDOMAIN}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$", max_length=253 + 1 + 63
)
QUALIFIED_NAME_FORMAT = "[prefix/]name, where name has at most 63 letters, digits, hyphens, underscores and dots"
LabelKey = Annotated[str, QUALIFIED_NAME, ValueDescription(f"a Kubernetes label key: {QUALIFIED_NAME_FORMAT}")]
LabelValue = Annotated[
    str,
    StringConstraints(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"),
    ValueDescription(
        "a Kubernetes label value: at most 63 letters, digits, hyphens, underscores and dots; quote numbers"
    ),
]
AnnotationKey = Annotated[
    str, QUALIFIED_NAME, ValueDescription(f"a Kubernetes annotation key: {QUALIFIED_NAME_FORMAT}")
]
AnnotationValue = Annotated[str, ValueDescription("a string; quote numbers, true and false")]
NAMESPACE = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
NamespaceName = Annotated[
    str,
    StringConstraints(pattern=f"^{NAMESPACE}$"),
    ValueDescription("a namespace: a-z, 0-9 and hyphen, at most 63 characters"),
]
# [registry[:port]/]name[:tag][@digest], as container runtimes parse it (github.com/distribution/reference).
IMAGE_REFERENCE = (
    r"([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]+)?/)?"
    r"[a-z0-9]+((\.|_|__|-+|/)[a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
ImageReference = Annotated[
    str,
    StringConstraints(pattern=f"^{IMAGE_REFERENCE}$", max_length=512),
    ValueDescription(
        "[registry/]name[:tag][@sha256:…], such as registry.example.com/team/topwork:1.0-gpu, at most 512 characters"
    ),
]
ConfigMapKey = Annotated[
    str,
    StringConstraints(pattern=r"^\.?[-_A-Za-z0-9][-._A-Za-z0-9]*$", max_length=253),
    ValueDescription("a ConfigMap key: letters, digits, hyphen, underscore and dot, at most 253 characters"),
]
ByteQuantity = Annotated[
    str,
    StringConstraints(pattern=r"^([1-9][0-9]{0,14}(\.[0-9]{1,9})?|0\.[0-9]{1,9})(k|M|G|T|Ki|Mi|Gi|Ti)$", max_length=32),
    ValueDescription("a Kubernetes quantity with its unit, such as 16Gi or 500M"),
]
CpuQuantity = Annotated[
    str,
    StringConstraints(pattern=r"^([1-9][0-9]{0,5}m?|[1-9][0-9]{0,5}\.[0-9]{1,3}|0\.[0-9]{0,2}[1-9])$"),
]
BYTE_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

TOLERATION_KEYS = ("key", "operator", "value", "effect", "tolerationSeconds")
TOLERATION_ENUMS = {
    "operator": ("Equal", "Exists"),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
}

# Schema of k8s.io/api/core/v1 Affinity as plain data: a dict lists the keys of a mapping ("*" allows any key, and a
# trailing "!" marks a required key), a list holds the schema of its items, and `str` and `int` are scalars.
REQUIRED, PREFERRED = (
    "requiredDuringSchedulingIgnoredDuringExecution",
    "preferredDuringSchedulingIgnoredDuringExecution",
)
STRINGS = {"*": str}
EXPRESSIONS = [{"key!": str, "operator!": str, "values": [str]}]
NODE_TERM = {"matchExpressions": EXPRESSIONS, "matchFields": EXPRESSIONS}
SELECTOR = {"matchLabels": STRINGS, "matchExpressions": EXPRESSIONS}
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


def quantity_to_bytes(quantity: str) -> float:
    """Convert a Kubernetes quantity with a unit, such as 16Gi, to bytes."""
    number = quantity.rstrip("kKMGTi")
    return float(number) * BYTE_UNITS[quantity[len(number) :]]


def cpu_to_millicores(cpu: str | int | float) -> int:
    """Convert CPU cores, as a number or a Kubernetes quantity such as 500m, to millicores; at least 1."""
    if isinstance(cpu, str) and cpu.endswith("m"):
        return int(cpu[:-1])
    return math.ceil(round(float(cpu) * 1000, 6))


def check_toleration(toleration: dict[str, Any], path: str) -> Iterator[Violation]:
    """Check the keys and values of a toleration.

    Args:
        toleration: The toleration as in a pod spec.
        path: Path of the toleration, for the violations.

    Yields:
        One violation for each key or value that the API server would reject.
    """
    for key, value in toleration.items():
        if key not in TOLERATION_KEYS:
            known = ", ".join(TOLERATION_KEYS)
            yield Violation(f"{path}.{key}", f"unknown key.{did_you_mean(key, TOLERATION_KEYS)} Known keys: {known}.")
        elif key == "tolerationSeconds":
            if type(value) is not int:
                yield Violation(f"{path}.{key}", f"{format_value(value)} is not allowed. Allowed: an integer.")
        elif not isinstance(value, str):
            yield Violation(f"{path}.{key}", f"{format_value(value)} is not allowed. Allowed: a string in quotes.")
        elif key in TOLERATION_ENUMS and value not in TOLERATION_ENUMS[key]:
            yield _not_one_of(f"{path}.{key}", value, TOLERATION_ENUMS[key])


def check_affinity(affinity: dict[str, Any], path: str) -> Iterator[Violation]:
    """Check an affinity against the schema of the Kubernetes API.

    Args:
        affinity: The affinity as in a pod spec.
        path: Path of the affinity, for the violations.

    Yields:
        One violation for each key or value that the API server would reject.
    """
    for kind, value in affinity.items():
        operators = NODE_OPERATORS if kind == "nodeAffinity" else POD_OPERATORS
        yield from _check_value({kind: value}, AFFINITY, path, operators)


def _check_value(value: Any, schema: Any, path: str, operators: tuple[str, ...]) -> Iterator[Violation]:
    if schema is str or schema is int:
        yield from _check_scalar(value, schema, path, operators)
    elif isinstance(schema, list) and isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _check_value(item, schema[0], f"{path}.{index}", operators)
    elif isinstance(schema, dict) and isinstance(value, dict):
        yield from _check_mapping(value, schema, path, operators)
    else:
        expected = "a list" if isinstance(schema, list) else "a mapping"
        yield Violation(path, f"{format_value(value)} is not allowed. Allowed: {expected}.")


def _check_mapping(
    value: dict[str, Any], schema: dict[str, Any], path: str, operators: tuple[str, ...]
) -> Iterator[Violation]:
    known = {key.removesuffix("!"): inner for key, inner in schema.items()}
    for key, inner in value.items():
        if key in known or "*" in known:
            yield from _check_value(inner, known.get(key, known.get("*")), f"{path}.{key}", operators)
        else:
            yield Violation(f"{path}.{key}", f"unknown key.{did_you_mean(key, known)} Known keys: {', '.join(known)}.")
    for key in schema:
        if key.endswith("!") and key[:-1] not in value:
            yield Violation(path, f"is missing {key[:-1]}, which Kubernetes requires.")


def _check_scalar(value: Any, schema: type, path: str, operators: tuple[str, ...]) -> Iterator[Violation]:
    if path.endswith(".operator"):
        if value not in operators:
            yield _not_one_of(path, value, operators)
    elif schema is int:
        if type(value) is not int or not 1 <= value <= 100:
            yield Violation(path, f"{format_value(value)} is not allowed. Allowed: an integer from 1 to 100.")
    elif not isinstance(value, str):
        yield Violation(path, f"{format_value(value)} is not allowed. Allowed: a string in quotes.")


def _not_one_of(path: str, value: Any, allowed: tuple[str, ...]) -> Violation:
    suggestion = did_you_mean(value, allowed)
    return Violation(path, f"{format_value(value)} is not allowed.{suggestion} Allowed: {', '.join(allowed)}.")
