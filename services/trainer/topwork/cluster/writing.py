"""Kubernetes objects as text: YAML as people read it, and JSON."""

import io
import json
import re
from collections.abc import Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode, SequenceNode
from ruamel.yaml.representer import RoundTripRepresenter

# kubectl reads YAML 1.1, where many a word and number is no text unless it stands in quotes: yes, 017, 1_000, 12:30.
NO_TEXT = re.compile(r"(y|n|yes|no|on|off|true|false|null|~|=|<<|[-+.]?[0-9][0-9a-fA-FxXoO_.:eE+-]*)?", re.IGNORECASE)
WIDE = 2**16
LONGEST_ON_ONE_LINE = 80


class _Representer(RoundTripRepresenter):
    """Writes as people do: short lists on one line, texts of several lines as blocks, quotes where they are needed."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> ScalarNode:
        style = None
        if _is_block(data):
            style = "|"
        elif not data.isprintable() or NO_TEXT.fullmatch(data):
            style = '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def represent_items(self, data: list[Any]) -> SequenceNode:
        words = [str(item) for item in data if isinstance(item, str | int)]
        on_one_line = len(words) == len(data) and sum(map(len, words)) <= LONGEST_ON_ONE_LINE
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=on_one_line)

    def represent_nothing(self, data: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


def _is_block(text: str) -> bool:
    """Whether a text of several lines can stand as they are, without a sign that a reader would have to know."""
    lines = text.removesuffix("\n").split("\n")
    return (
        "\n" in text
        and not text.startswith((" ", "\n"))
        and all(line.isprintable() and not line.endswith(" ") for line in lines)
        and lines[-1] != ""
    )


_Representer.add_representer(str, _Representer.represent_text)
_Representer.add_representer(list, _Representer.represent_items)
_Representer.add_representer(type(None), _Representer.represent_nothing)


def as_yaml(objects: Sequence[dict[str, Any]]) -> str:
    """Write objects as YAML.

    Args:
        objects: Kubernetes objects.

    Returns:
        One document each, with the keys in their order.
    """
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width = WIDE
    text = io.StringIO()
    yaml.dump_all(objects, text)
    return text.getvalue()


def as_json(objects: Sequence[dict[str, Any]]) -> str:
    """Write objects as one JSON list that `kubectl apply` takes."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}, indent=2, ensure_ascii=False) + "\n"
