"""Writes job specs and Kubernetes objects as readable YAML.

This module uses PyYAML with libyaml, which writes about ten times faster than ruamel.yaml.
"""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from topwork.spec.job import TransferJob

# Values that concern the TransferJob in a cluster, not its run.
OUTSIDE_THE_RUN: dict[str, Any] = {"metadata": {"namespace": True, "annotations": True}, "spec": {"suspend": True}}
# Defaults that are not written. The digest of a Job covers the other ones: that of a Job remains as it was before these
# keys existed.
NEWER_KEYS: dict[tuple[str, ...], Any] = {
    ("evaluate", "calibration"): "none",
    ("publish", "enabled"): True,
    ("compute", "nodes"): 1,
    ("compute", "keepCheckpoint"): False,
    ("tracking",): {"tensorboard": False},
}

# YAML 1.1 (kubectl) and YAML 1.2 parsers read these as other types unless they are quoted: yes, 017, 1_000, 12:30, 1e5.
AMBIGUOUS = re.compile(r"(y|n|yes|no|on|off|true|false|null|~|=|<<|[-+.]?[0-9][0-9a-fA-FxXoO_.:eE+-]*)?", re.IGNORECASE)
UNLIMITED_WIDTH = 2**16
MAX_FLOW_LENGTH = 80


class _Dumper(yaml.CSafeDumper):
    """Writes short lists on one line, multi-line strings as blocks, and quotes only where they are needed."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_string(self, data: str) -> yaml.ScalarNode:
        style = None
        if _is_block(data):
            style = "|"
        elif not data.isprintable() or AMBIGUOUS.fullmatch(data):
            style = '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def represent_items(self, data: Sequence[Any]) -> yaml.SequenceNode:
        words = [str(item) for item in data if isinstance(item, str | int)]
        fits_on_one_line = len(words) == len(data) and sum(map(len, words)) <= MAX_FLOW_LENGTH
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=fits_on_one_line)


def _is_block(text: str) -> bool:
    """Return whether a multi-line string fits in a `|` block without indentation or chomping indicators."""
    lines = text.removesuffix("\n").split("\n")
    return (
        "\n" in text
        and not text.startswith((" ", "\n"))
        and all(line.isprintable() and not line.endswith(" ") for line in lines)
        and lines[-1] != ""
    )


_Dumper.add_representer(str, _Dumper.represent_string)
_Dumper.add_representer(list, _Dumper.represent_items)


def dump_yaml(documents: Sequence[dict[str, Any]]) -> str:
    """Write mappings as YAML documents.

    Args:
        documents: Mappings of JSON values.

    Returns:
        One YAML document per mapping, with keys in their original order.

    Example:
        >>> print(dump_yaml([{"metadata": {"name": "cats"}}]), end="")
        metadata:
          name: cats
    """
    dumped = yaml.dump_all(
        documents, Dumper=_Dumper, default_flow_style=False, sort_keys=False, allow_unicode=True, width=UNLIMITED_WIDTH
    )
    return str(dumped)


def job_to_dict(job: TransferJob) -> dict[str, Any]:
    """Convert the spec of a run to JSON values, including defaults but no null values.

    Args:
        job: The job. Its namespace, annotations and spec.suspend are not part of the run.

    Returns:
        Nested mappings with camelCase keys in the order of the reference, without the defaults of `NEWER_KEYS`.
    """
    data: dict[str, Any] = job.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=OUTSIDE_THE_RUN)
    for path, default in NEWER_KEYS.items():
        *parents, key = path
        section = data["spec"]
        for parent in parents:
            section = section[parent]
        if section[key] == default:
            del section[key]
    return data


def dump_job(job: TransferJob) -> str:
    """Write a job spec as YAML, including defaults.

    Args:
        job: The job.

    Returns:
        YAML that loads as the same job, with keys in the order of the reference.
    """
    return dump_yaml([job_to_dict(job)])
