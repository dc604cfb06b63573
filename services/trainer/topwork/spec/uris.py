"""URIs in the spec: s3://, http(s):// and local paths, validated and free of credentials."""

import re
from collections.abc import Callable
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from topwork.redaction import SECRET_PARAMETER
from topwork.spec.messages import did_you_mean, format_value
from topwork.spec.spec_model import ValueDescription

# Bucket names of Amazon S3: 3 to 63 characters of a-z, 0-9, dot and hyphen.
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
SECRET = re.compile(SECRET_PARAMETER, re.IGNORECASE)
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
TABLES = (".csv", ".jsonl", ".ndjson")
MODELS = (".keras", ".h5", ".hdf5")
MAX_URI_LENGTH = 4096
"""Maximum number of characters: that of a path on Linux. S3 keys have at most 1024 bytes."""


def invalid_value(message: str) -> PydanticCustomError:
    """Create the validation error of a single field; users see the message unchanged."""
    return PydanticCustomError("invalid_value", "{message}", {"message": message})


def uri_validator(
    *schemes: str, local: bool = False, extensions: tuple[str, ...] = (), prefix: bool = False
) -> Callable[[str], str]:
    """Create a validator for URIs.

    Args:
        *schemes: Allowed schemes, such as `s3`.
        local: Whether local paths are allowed too.
        extensions: Allowed file extensions of S3 keys and local paths; empty allows all.
        prefix: Whether an S3 URI names a bucket or a prefix instead of one object.

    Returns:
        A function that returns its argument, or raises an error that explains why the URI is invalid.
    """

    def validate(value: str) -> str:
        if len(value) > MAX_URI_LENGTH:
            raise invalid_value(f"has {len(value)} characters, more than the maximum of {MAX_URI_LENGTH}")
        _reject_secrets(value)
        if not value or value != value.strip() or any(ord(character) < 32 for character in value):
            raise invalid_value("is empty, starts or ends with a space, or contains a control character")
        scheme = SCHEME.match(value)
        if scheme is None:
            if not local:
                raise invalid_value(f"{format_value(value)} has no scheme. Allowed: {_list_forms(schemes, local)}")
        elif scheme[1] not in schemes or not value.startswith(f"{scheme[1]}://"):
            raise invalid_value(f"{format_value(value)} is not allowed. Allowed: {_list_forms(schemes, local)}")
        elif scheme[1] == "s3":
            _validate_s3(value, prefix)
        elif not urlsplit(value).hostname:
            raise invalid_value("has no host name")
        # http(s) URLs may have any extension: the type of an archive is detected from its content.
        if extensions and (scheme is None or scheme[1] == "s3") and not value.lower().endswith(extensions):
            raise invalid_value(f"{format_value(value)} does not end in one of {', '.join(extensions)}")
        return value

    return validate


def _list_forms(schemes: tuple[str, ...], local: bool) -> str:
    return ", ".join([f"{scheme}://…" for scheme in schemes] + ["a local path"] * local)


def _reject_secrets(value: str) -> None:
    if "://" not in value:
        return
    try:
        parts = urlsplit(value)
        names = [name for part in (parts.query, parts.fragment) for name, _ in parse_qsl(part, keep_blank_values=True)]
    except ValueError:
        raise invalid_value("is not a valid URL") from None
    if "@" in parts.netloc:
        raise invalid_value(
            "contains a user name or password (not shown here), but specs are stored and shared. "
            "Remove it and pass credentials in environment variables"
        )
    secret = next((name for name in names if SECRET.fullmatch(name)), None)
    if secret:
        raise invalid_value(
            f"is signed or has a secret in its query ({secret}, not shown here), but specs are stored and shared. "
            "Copy the file to S3 and use s3://bucket/key"
        )


def _validate_s3(value: str, prefix: bool) -> None:
    bucket, _, key = value.removeprefix("s3://").partition("/")
    if not BUCKET.fullmatch(bucket):
        raise invalid_value(
            f"{format_value(bucket)} is not a bucket name. Use 3 to 63 characters of a-z, 0-9, dot and hyphen"
        )
    if "?" in key or "#" in key:
        raise invalid_value(f"{format_value(value)} has ? or # in its key, which topwork does not support")
    if not prefix and (not key or key.endswith("/")):
        raise invalid_value(f"{format_value(value)} does not name an object. Use s3://bucket/key")
    if any(part in {"", ".", ".."} for part in key.removesuffix("/").split("/") if key):
        raise invalid_value(f"{format_value(value)} has an empty segment, . or .. in its key")


def prefixes_overlap(first: str, second: str) -> bool:
    """Return whether two s3:// prefixes are equal or one contains the other.

    Example:
        >>> prefixes_overlap("s3://bucket/photos", "s3://bucket/photos/cats/")
        True
        >>> prefixes_overlap("s3://bucket/photos", "s3://bucket/photos2")
        False
    """
    segments = [[part for part in uri.removeprefix("s3://").split("/") if part] for uri in (first, second)]
    return all(left == right for left, right in zip(*segments, strict=False))


StorageUri = Annotated[
    str, AfterValidator(uri_validator("s3", prefix=True)), ValueDescription("s3://bucket or s3://bucket/prefix")
]
FolderUri = Annotated[
    str,
    AfterValidator(uri_validator("s3", local=True, prefix=True)),
    ValueDescription("s3://bucket/prefix/ or a local path"),
]
ArchiveUri = Annotated[
    str,
    AfterValidator(uri_validator("http", "https", "s3", local=True, extensions=ARCHIVES)),
    ValueDescription("http(s)://host/file, s3://bucket/key or a local path"),
]
TableUri = Annotated[
    str,
    AfterValidator(uri_validator("s3", local=True, extensions=TABLES)),
    ValueDescription("s3://bucket/key or a local path, ending in .csv, .jsonl or .ndjson"),
]
ListUri = Annotated[
    str,
    AfterValidator(uri_validator("s3", local=True)),
    ValueDescription("s3://bucket/key or a local path of a text file"),
]
ModelUri = Annotated[
    str,
    AfterValidator(uri_validator("s3", local=True, extensions=MODELS)),
    ValueDescription("s3://bucket/key or a local path, ending in .keras, .h5 or .hdf5"),
]
HttpUrl = Annotated[str, AfterValidator(uri_validator("http", "https")), ValueDescription("http(s)://host:port")]

WEIGHTS = "imagenet, none, or s3://bucket/key or a local path, ending in .h5"


def validate_weights(value: str) -> str:
    """Return the value if it is a known keyword or the URI of a weights file, or raise an error."""
    if value in {"imagenet", "none"}:
        return value
    if not value.lower().endswith(".h5"):
        suggestion = did_you_mean(value, ("imagenet", "none"))
        raise invalid_value(f"{format_value(value)} is not allowed.{suggestion} Allowed: {WEIGHTS}.")
    return uri_validator("s3", local=True)(value)


Weights = Annotated[str, AfterValidator(validate_weights), ValueDescription(WEIGHTS)]
