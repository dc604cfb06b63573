"""Label and field selectors of the API server used in tests."""

from api_apply import value_at
from api_kinds import Object


def matches_selectors(obj: Object, labels: str, fields: str) -> bool:
    """Match an object against a labelSelector (`a=b`, `a!=b`, `a in (b,c)`, `a`, `!a`) and a fieldSelector."""
    labels_of_object = obj.get("metadata", {}).get("labels", {}) or {}
    return all(_matches_label(labels_of_object, part) for part in _split_selector(labels)) and all(
        _matches_field(obj, part) for part in _split_selector(fields)
    )


def _split_selector(selector: str) -> list[str]:
    parts, depth = [""], 0
    for character in selector:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _matches_label(labels: dict[str, str], part: str) -> bool:
    if " notin " in part or " in " in part:
        operator = " notin " if " notin " in part else " in "
        name, _, values = part.partition(operator)
        is_in = labels.get(name.strip()) in {value.strip() for value in values.strip(" ()").split(",")}
        return is_in != (operator == " notin ")
    if "!=" in part:
        name, _, value = part.partition("!=")
        return labels.get(name) != value
    if "=" in part:
        name, _, value = part.replace("==", "=").partition("=")
        return labels.get(name) == value
    return part[1:] not in labels if part.startswith("!") else part in labels


def _matches_field(obj: Object, part: str) -> bool:
    expect_equal = "!=" not in part
    name, _, value = part.replace("!=", "=").replace("==", "=").partition("=")
    return (str(value_at(obj, tuple(name.split("."))) or "") == value) == expect_equal
