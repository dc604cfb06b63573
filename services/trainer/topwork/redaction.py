"""Redaction: removing passwords, keys, tokens and signatures from any text that is logged or stored."""

import re
from collections.abc import Iterable
from urllib.parse import quote

MIN_SECRET_LENGTH = 6
"""Shorter values occur in too many ordinary words to be replaced everywhere."""

# Query parameters of signed URLs (Amazon, Google, Azure, Alibaba, CloudFront) and common names of tokens.
SECRET_PARAMETER = (
    r"x-(?:amz|goog|oss|cos)-(?:signature|credential|security-token)|"  # noqa: S105 - names of parameters
    r"awsaccesskeyid|ossaccesskeyid|signature|sig|"
    r"key-pair-id|[\w.-]*(?:token|secret|password|passwd|api[_-]?key|credential|authorization)"
)
_PATTERNS = (
    # User and password in a URL.
    (re.compile(r"://[^/?#\s\"']+@"), "://***@"),
    # A signature or token in a query string, a header or a message.
    (re.compile(rf"(?<![\w.-])((?:{SECRET_PARAMETER})=)[^&;,\s\"'<>]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(authorization[\"']?\s*:\s*)[^\r\n]+", re.IGNORECASE), r"\1***"),
    # Keys that are recognized by their format: Amazon, Hugging Face, GitHub, GitLab, Slack, JSON web tokens.
    (re.compile(r"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"), "***"),
    (re.compile(r"\b(?:hf_|gh[opsu]_|github_pat_|glpat-|xox[abp]-)[\w-]{16,}"), "***"),
    (re.compile(r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"), "***"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), "***"),
)

_secrets_by_source: dict[str, frozenset[str]] = {}
_spellings: tuple[str, ...] = ()


def register_secrets(values: Iterable[str], source: str) -> None:
    """Register values that `redact` replaces, for the whole process.

    Args:
        values: Passwords, keys and tokens. They replace the values that were registered earlier for the same source.
        source: Where they come from, such as `environment`.
    """
    global _spellings  # noqa: PLW0603 - the registered secrets are process-wide
    _secrets_by_source[source] = frozenset(value for value in values if len(value) >= MIN_SECRET_LENGTH)
    secrets = frozenset().union(*_secrets_by_source.values())
    # In a URL, a slash is written as %2F and a plus sign as %2B.
    spellings = secrets | {quote(value, safe="") for value in secrets}
    _spellings = tuple(sorted(spellings, key=len, reverse=True))


def redact(text: str) -> str:
    """Replace registered secrets, and everything that looks like a secret, with `***`.

    Args:
        text: A message, a name or a traceback.

    Returns:
        The redacted text, as valid Unicode.

    Example:
        >>> redact("https://ada:pass@host/a.zip?sig=4f2a")
        'https://***@host/a.zip?sig=***'
    """
    for spelling in _spellings:
        text = text.replace(spelling, "***")
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text.encode(errors="replace").decode()
