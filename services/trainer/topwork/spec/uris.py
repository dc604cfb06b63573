"""Addresses of things outside the spec: s3://, http(s):// and local paths, never with a password in them."""

import re
from collections.abc import Callable
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from topwork.redaction import SECRET_PARAMETER
from topwork.spec.messages import hint, shown
from topwork.spec.section import Meaning

# Bucket names of Amazon S3: 3 to 63 characters of a-z, 0-9, dot and dash.
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
SECRET = re.compile(SECRET_PARAMETER, re.IGNORECASE)
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
TABLES = (".csv", ".jsonl", ".ndjson")
MODELS = (".keras", ".h5")


def refused(reason: str) -> PydanticCustomError:
    """Make the error of a field whose value is refused for a reason that is told as it stands."""
    return PydanticCustomError("refused", "{reason}", {"reason": reason})


def address(
    *schemes: str, local: bool = False, endings: tuple[str, ...] = (), prefix: bool = False
) -> Callable[[str], str]:
    """Make the check of an address.

    Args:
        *schemes: Schemes that are allowed, such as s3.
        local: Whether a local path is allowed too.
        endings: File endings of which the path must have one, where it isn't an http(s) address; empty allows all.
        prefix: Whether a bucket or a folder is meant, and not one object.

    Returns:
        A function that returns its argument or raises with the reason.
    """

    def check(value: str) -> str:
        _refuse_secrets(value)
        if not value or value != value.strip() or any(ord(character) < 32 for character in value):
            raise refused("is empty, or begins or ends with a space, or holds a control character")
        scheme = SCHEME.match(value)
        if scheme is None:
            if not local:
                raise refused(f"{shown(value)} has no scheme. Allowed: {_forms(schemes, local)}")
        elif scheme[1] not in schemes or not value.startswith(f"{scheme[1]}://"):
            raise refused(f"{shown(value)} is not allowed. Allowed: {_forms(schemes, local)}")
        elif scheme[1] == "s3":
            _check_s3(value, prefix)
        elif not urlsplit(value).hostname:
            raise refused("names no host")
        # An http(s) address may end in anything: its archive is told by its content.
        if endings and (scheme is None or scheme[1] == "s3") and not value.lower().endswith(endings):
            raise refused(f"{shown(value)} does not end in one of {', '.join(endings)}")
        return value

    return check


def _forms(schemes: tuple[str, ...], local: bool) -> str:
    return ", ".join([f"{scheme}://…" for scheme in schemes] + ["a local path"] * local)


def _refuse_secrets(value: str) -> None:
    if "://" not in value:
        return
    try:
        parts = urlsplit(value)
        names = [name for part in (parts.query, parts.fragment) for name, _ in parse_qsl(part, keep_blank_values=True)]
    except ValueError:
        raise refused("is no well-formed address") from None
    if "@" in parts.netloc:
        raise refused(
            "holds a user name or password (not shown here), and a spec is stored and shared. "
            "Take it out, and hand credentials over by the environment"
        )
    secret = next((name for name in names if SECRET.fullmatch(name)), None)
    if secret:
        raise refused(
            f"is signed or holds a secret in its query ({secret}, not shown here), and a spec is stored and shared. "
            "Copy the file to S3 and name it as s3://bucket/key"
        )


def _check_s3(value: str, prefix: bool) -> None:
    bucket, _, key = value.removeprefix("s3://").partition("/")
    if not BUCKET.fullmatch(bucket):
        raise refused(f"{shown(bucket)} is no bucket name: 3 to 63 characters of a-z, 0-9, dot and dash")
    if "?" in key or "#" in key:
        raise refused(f"{shown(value)} holds ? or # in its key, which no key here does")
    if not prefix and (not key or key.endswith("/")):
        raise refused(f"{shown(value)} names no object: s3://bucket/key is expected")
    if any(part in {"", ".", ".."} for part in key.removesuffix("/").split("/") if key):
        raise refused(f"{shown(value)} has an empty part, . or .. in its key")


StorageUri = Annotated[str, AfterValidator(address("s3", prefix=True)), Meaning("s3://bucket or s3://bucket/prefix")]
FolderUri = Annotated[
    str, AfterValidator(address("s3", local=True, prefix=True)), Meaning("s3://bucket/prefix/ or a local path")
]
ArchiveUri = Annotated[
    str,
    AfterValidator(address("http", "https", "s3", local=True, endings=ARCHIVES)),
    Meaning("http(s)://host/file, s3://bucket/key or a local path"),
]
TableUri = Annotated[
    str,
    AfterValidator(address("s3", local=True, endings=TABLES)),
    Meaning("s3://bucket/key or a local path, ending in .csv, .jsonl or .ndjson"),
]
ModelUri = Annotated[
    str,
    AfterValidator(address("s3", local=True, endings=MODELS)),
    Meaning("s3://bucket/key or a local path, ending in .keras or .h5"),
]
HttpUrl = Annotated[str, AfterValidator(address("http", "https")), Meaning("http(s)://host:port")]

WEIGHTS = "imagenet, none, or s3://bucket/key or a local path, ending in .h5"


def check_weights(value: str) -> str:
    """Refuse base weights that are neither a known word nor the address of a weights file."""
    if value in {"imagenet", "none"}:
        return value
    if not value.lower().endswith(".h5"):
        known = hint(value, ("imagenet", "none"))
        raise refused(f"{shown(value)} is not allowed.{known} Allowed: {WEIGHTS}.")
    return address("s3", local=True)(value)


Weights = Annotated[str, AfterValidator(check_weights), Meaning(WEIGHTS)]
