"""How messages show what stood in a spec, and how they find the nearest known word."""

import difflib
import json
import re
from collections.abc import Iterable

LONGEST = 60
SECRET = re.compile(r"://[^/\s]*@|[?].*", re.DOTALL)


def shown(value: object) -> str:
    """Show a value in a message: short, on one line and without what may be a secret.

    Args:
        value: Whatever YAML or Python handed in.

    Returns:
        Text in quotes, numbers as they are, and collections by their size.
    """
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"a mapping with {listed([shown(key) for key in list(value)[:5]])}" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        text = SECRET.sub("…", value) if "://" in value else value
        return json.dumps(text if len(text) <= LONGEST else f"{text[:LONGEST]}…", ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e-4 else str(value)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Find the known word that was probably meant.

    Args:
        word: What was written.
        known: The words that are allowed.

    Returns:
        The nearest known word, whatever its case, dashes and underscores; None where none is near.
    """
    plain = {_plain(candidate): candidate for candidate in known}
    found = difflib.get_close_matches(_plain(word[:LONGEST]), plain, n=1, cutoff=0.6)
    return plain[found[0]] if found else None


def hint(word: object, known: Iterable[str]) -> str:
    """Ask `Did you mean …?`, with a space before it; nothing where no known word is near."""
    found = nearest(word, known) if isinstance(word, str) else None
    return f" Did you mean {found}?" if found else ""


def listed(words: list[str], last: str = "and") -> str:
    """Join words as a sentence does: `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _plain(word: str) -> str:
    return re.sub(r"[-_\s]", "", word).lower()
