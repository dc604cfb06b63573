"""Kubernetes objects as text: YAML as people read it, and JSON."""

import io
import json
import re
from collections.abc import Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

# kubectl reads YAML 1.1, where many a word and number is no text unless it stands in quotes: yes, 017, 1_000, 12:30.
NO_TEXT = re.compile(r"(y|n|yes|no|on|off|true|false|null|~|=|<<|[-+.]?[0-9][0-9a-fA-FxXoO_.:eE+-]*)?", re.IGNORECASE)
WIDE = 2**16


class _Representer(RoundTripRepresenter):
    """Writes every object out, texts of several lines as blocks, and in quotes what kubectl would take for no text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> ScalarNode:
        style = None
        if _is_block(data):
            style = "|"
        elif not data.isprintable() or NO_TEXT.fullmatch(data):
            style = '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


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
