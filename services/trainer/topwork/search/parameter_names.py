"""Short names and values of the parameters of a search, for tables and plots."""

import json
from collections.abc import Iterable
from typing import Any

MAX_VALUE_CHARACTERS = 40


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Shorten the paths of parameters to their last keys, as far as they remain different.

    Args:
        paths: Paths, such as `transfer.optimizer.learningRate`.

    Returns:
        The short name of each path.

    Example:
        >>> short_names(["transfer.optimizer.learningRate", "model.head.dropout"])
        {'transfer.optimizer.learningRate': 'learningRate', 'model.head.dropout': 'dropout'}
    """
    keys = {path: path.split(".") for path in paths}
    names = {}
    for path, own in keys.items():
        others = [other for other in keys.values() if other is not own]
        length = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        names[path] = ".".join(own[-length:])
    return names


def format_parameter(value: Any) -> str:
    """Format a value for a table, with four significant digits.

    Example:
        >>> format_parameter(0.00123456)
        '0.001235'
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[: MAX_VALUE_CHARACTERS - 1]}…"
