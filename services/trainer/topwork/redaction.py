"""What nobody may read in a log, a report or storage: taken out of every text that is said or kept."""

import re
from collections.abc import Iterable
from urllib.parse import quote

LEAST_CHARACTERS = 6
"""Shorter values are in too many words to be taken out of a text."""

# What signed addresses of Amazon, Google, Azure, Alibaba and CloudFront carry, and what tokens are commonly called.
SECRET_PARAMETER = (
    r"x-(?:amz|goog|oss|cos)-(?:signature|credential|security-token)|"  # noqa: S105 - their names
    r"awsaccesskeyid|ossaccesskeyid|signature|sig|"
    r"key-pair-id|[\w.-]*(?:token|secret|password|passwd|api[_-]?key|credential|authorization)"
)
_PLACES = (
    # The user and password of an address.
    (re.compile(r"://[^/?#\s\"']+@"), "://***@"),
    # A signature or token in the query of an address, in a header or in a message.
    (re.compile(rf"(?<![\w.-])((?:{SECRET_PARAMETER})=)[^&;,\s\"'<>]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(authorization[\"']?\s*:\s*)[^\r\n]+", re.IGNORECASE), r"\1***"),
    # Keys that tell by their form what they are: of Amazon, of Hugging Face, GitHub, GitLab and Slack, and JSON web
    # tokens.
    (re.compile(r"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"), "***"),
    (re.compile(r"\b(?:hf_|gh[opsu]_|github_pat_|glpat-|xox[abp]-)[\w-]{16,}"), "***"),
    (re.compile(r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"), "***"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), "***"),
)

_known: dict[str, frozenset[str]] = {}
_hidden: tuple[str, ...] = ()


def hide(values: Iterable[str], origin: str) -> None:
    """Say which values are secret.

    Args:
        values: Passwords, keys and tokens. They replace those that were said before of the same origin.
        origin: Where they come from, such as the environment.
    """
    global _hidden  # noqa: PLW0603 - what is secret is so in the whole process
    _known[origin] = frozenset(value for value in values if len(value) >= LEAST_CHARACTERS)
    long = frozenset().union(*_known.values())
    # In an address a slash or plus is written as %2F and %2B.
    spellings = long | {quote(value, safe="") for value in long}
    _hidden = tuple(sorted(spellings, key=len, reverse=True))


def without_secrets(text: str) -> str:
    """Take out of a text what nobody may read: values that are secret, and what looks like a secret.

    Args:
        text: A message, a name or a traceback.

    Returns:
        The text with three asterisks in their places, and as proper Unicode.
    """
    for value in _hidden:
        text = text.replace(value, "***")
    for pattern, shown in _PLACES:
        text = pattern.sub(shown, text)
    return text.encode(errors="replace").decode()
