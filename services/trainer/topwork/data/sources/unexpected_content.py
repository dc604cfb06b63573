"""Recognizes what a file is if it is not the archive that it should be: a web page, an error message, a pointer."""

import html
import json
import re
from pathlib import Path

from topwork.data.sources.source import escape_name

MAX_TEXT_LENGTH = 100
"""Characters of a title or message that are shown."""

_HEAD_BYTES = 2**16
_HTML = re.compile(
    r"\s*(?:<!--.*?-->\s*)*(?:<!doctype\s+html|<(?:html|head|body|title|meta|script)\b)", re.IGNORECASE | re.DOTALL
)
_TITLE = re.compile(r"<title[^>]*>(.*?)(?:</title|\Z)", re.IGNORECASE | re.DOTALL)
_XML = re.compile(r"\s*<(?:\?xml|Error\b)", re.IGNORECASE)
_XML_MESSAGE = re.compile(r"<(Code|Message)>([^<]*)<", re.IGNORECASE)
_OTHER_ARCHIVES = {
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"PAR1": "a Parquet file",
    b"%PDF-": "a PDF document",
    b"\x93NUMPY": "a NumPy array",
}


def describe_unexpected(path: Path) -> str | None:
    """Describe a file that is not a readable archive.

    Args:
        path: The file.

    Returns:
        A sentence, such as `It is an HTML page with the title "Sign in". …`, or None if the file is not recognized.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        return "It is empty: the file was not uploaded or downloaded completely."
    if head.startswith((b"PK\x03\x04", b"PK\x07\x08")):
        return "It begins like a zip file, but its end is missing: it is truncated. Download or create it again."
    for magic, kind in _OTHER_ARCHIVES.items():
        if head.startswith(magic):
            return f"It is {kind}, which is not supported. Repack it as zip or tar."
    return _describe_text(head)


def _describe_text(head: bytes) -> str | None:
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = head.decode(encoding, errors="replace")
    if text.startswith("version https://git-lfs.github.com/spec/"):
        return "It is a Git LFS pointer, not the file itself. Run `git lfs pull`, or use the address of the content."
    if "/annex/objects/" in text[:1000] and len(head) < 1000:
        return "It is a git-annex pointer, not the file itself. Run `git annex get`."
    if _HTML.match(text):
        title = _TITLE.search(text)
        name = f' with the title "{_shorten(html.unescape(title[1]))}"' if title and title[1].strip() else ""
        return (
            f"It is an HTML page{name}, such as a login form, a confirmation of the download or an error message. Use "
            "the direct address of the file, or copy the file to S3."
        )
    if _XML.match(text):
        message = ": ".join(content for _, content in _XML_MESSAGE.findall(text)) or text
        return f"It is an XML document: {_shorten(message)}. Check the address and the permissions of the file."
    if text.lstrip()[:1] in ("{", "[") and _is_json_prefix(text):
        return f"It is a JSON document: {_shorten(text)}. Check the address and the permissions of the file."
    if head.isascii() and text.isprintable():
        return f"It is text: {_shorten(text)}. Check the address."
    return None


def _is_json_prefix(text: str) -> bool:
    """Return whether a text is JSON, or the beginning of a long JSON document."""
    try:
        json.loads(text)
    except ValueError:
        return len(text) >= _HEAD_BYTES - 3 and bool(re.match(r'\s*[\[{]\s*["\[{\d]', text))
    except RecursionError:
        return True
    return True


def _shorten(text: str) -> str:
    words = escape_name(" ".join(text.split()))
    return words if len(words) <= MAX_TEXT_LENGTH else f"{words[:MAX_TEXT_LENGTH]}…"
