"""Writing job specs and Kubernetes objects as YAML, as people write it.

PyYAML writes through libyaml, some ten times faster than ruamel.yaml, which reads and keeps the line of every key.
"""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from topwork.spec.job import TransferJob

# Readers of YAML 1.1 (kubectl) and 1.2 take many a word and number for no text unless it stands in quotes: yes, 017,
# 1_000, 12:30, 1e5.
NO_TEXT = re.compile(r"(y|n|yes|no|on|off|true|false|null|~|=|<<|[-+.]?[0-9][0-9a-fA-FxXoO_.:eE+-]*)?", re.IGNORECASE)
WIDE = 2**16
LONGEST_ON_ONE_LINE = 80


class _Dumper(yaml.CSafeDumper):
    """Short lists on one line, texts of several lines as blocks, quotes where they are needed."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        style = None
        if _is_block(data):
            style = "|"
        elif not data.isprintable() or NO_TEXT.fullmatch(data):
            style = '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def represent_items(self, data: Sequence[Any]) -> yaml.SequenceNode:
        words = [str(item) for item in data if isinstance(item, str | int)]
        on_one_line = len(words) == len(data) and sum(map(len, words)) <= LONGEST_ON_ONE_LINE
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=on_one_line)


def _is_block(text: str) -> bool:
    """Whether a text of several lines can stand as they are, without a sign that a reader would have to know."""
    lines = text.removesuffix("\n").split("\n")
    return (
        "\n" in text
        and not text.startswith((" ", "\n"))
        and all(line.isprintable() and not line.endswith(" ") for line in lines)
        and lines[-1] != ""
    )


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(list, _Dumper.represent_items)


def as_yaml(documents: Sequence[dict[str, Any]]) -> str:
    """Write mappings as YAML.

    Args:
        documents: Mappings of JSON values.

    Returns:
        One document each, with the keys in their order.
    """
    dumped = yaml.dump_all(
        documents, Dumper=_Dumper, default_flow_style=False, sort_keys=False, allow_unicode=True, width=WIDE
    )
    return str(dumped)


def plain(job: TransferJob) -> dict[str, Any]:
    """Give a job spec in full, as JSON values: every key that has a value, defaults as well.

    Args:
        job: The job.

    Returns:
        Mappings with their keys in the order of the reference.
    """
    return job.model_dump(mode="json", by_alias=True, exclude_none=True)


def yaml_text(job: TransferJob) -> str:
    """Write a job spec in full: every key, defaults as well, in the order of the reference.

    Args:
        job: The job.

    Returns:
        YAML that reads back as the same job.
    """
    return as_yaml([plain(job)])
