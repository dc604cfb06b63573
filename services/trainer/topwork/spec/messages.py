"""Building blocks of error messages: values without secrets, suggestions for typos, and lists of words."""

import difflib
import json
import re
from collections.abc import Iterable

MAX_LENGTH = 60
SECRET = re.compile(r"://[^/\s]*@|[?].*", re.DOTALL)


def format_value(value: object) -> str:
    """Format a value for a message: short, on one line, without credentials and query strings of URIs.

    Args:
        value: Any value from YAML or Python.

    Returns:
        Strings in quotes and shortened to 60 characters, numbers unchanged, and collections by their size.

    Example:
        >>> format_value("s3://user:password@bucket/key")
        '"s3…bucket/key"'
        >>> format_value([1, 2])
        'a list of 2'
    """
    if value is None:
        return "null"
    if isinstance(value, dict):
        return (
            f"a mapping with {join_words([format_value(key) for key in list(value)[:5]])}"
            if value
            else "an empty mapping"
        )
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        text = SECRET.sub("…", value) if "://" in value else value
        return json.dumps(text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}…", ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e-4 else str(value)


def nearest_word(word: str, known: Iterable[str]) -> str | None:
    """Find the known word that the user probably meant.

    Args:
        word: The word as written.
        known: The allowed words.

    Returns:
        The most similar known word, ignoring case, hyphens and underscores; None if none is similar.
    """
    normalized = {_normalize(candidate): candidate for candidate in known}
    matches = difflib.get_close_matches(_normalize(word[:MAX_LENGTH]), normalized, n=1, cutoff=0.6)
    return normalized[matches[0]] if matches else None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return ` Did you mean …?` with a leading space, or an empty string if no known word is similar."""
    match = nearest_word(word, known) if isinstance(word, str) else None
    return f" Did you mean {match}?" if match else ""


def join_words(words: list[str], conjunction: str = "and") -> str:
    """Join words as in a sentence: `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


def count_noun(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 image` or `2 images`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _normalize(word: str) -> str:
    return re.sub(r"[-_\s]", "", word).lower()
