"""Label and field selectors, for the API server that tests use."""

from typing import Any

from api_apply import value_at

Object = dict[str, Any]


def selected(found: Object, labels: str, fields: str) -> bool:
    """Whether an object meets a labelSelector (`a=b`, `a!=b`, `a in (b,c)`, `a`, `!a`) and a fieldSelector."""
    own = found.get("metadata", {}).get("labels", {}) or {}
    return all(_meets(own, part) for part in _parts(labels)) and all(
        _meets_field(found, part) for part in _parts(fields)
    )


def _parts(selector: str) -> list[str]:
    parts, depth = [""], 0
    for letter in selector:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _meets(labels: dict[str, str], part: str) -> bool:
    if " notin " in part or " in " in part:
        word = " notin " if " notin " in part else " in "
        name, _, values = part.partition(word)
        among = labels.get(name.strip()) in {each.strip() for each in values.strip(" ()").split(",")}
        return among != (word == " notin ")
    if "!=" in part:
        name, _, value = part.partition("!=")
        return labels.get(name) != value
    if "=" in part:
        name, _, value = part.replace("==", "=").partition("=")
        return labels.get(name) == value
    return part[1:] not in labels if part.startswith("!") else part in labels


def _meets_field(found: Object, part: str) -> bool:
    equal = "!=" not in part
    name, _, value = part.replace("!=", "=").replace("==", "=").partition("=")
    return (str(value_at(found, tuple(name.split("."))) or "") == value) == equal
