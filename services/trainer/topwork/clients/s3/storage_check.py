"""Tests every S3 operation that jobs need, with small objects, before any work starts.

Each call uses its own random keys, so that concurrent processes do not disturb each other. Where topwork can do without
an operation, the result is kept in the `Server` of the storage: checksums and DeleteObjects.
"""

import base64
import hashlib
import io
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from botocore import exceptions as boto

from topwork.clients.s3.cleanup import tolerate_cleanup_failure
from topwork.clients.s3.conditional_writes import put_object
from topwork.clients.s3.deletion import MAX_BATCH
from topwork.clients.s3.errors import (
    DAMAGED_REQUEST_CODES,
    ERRORS_BY_CODE,
    AccessError,
    error_code,
    http_status,
    is_temporary_status,
)
from topwork.clients.s3.part_upload import PartUpload
from topwork.clients.s3.storage import PROBE_PREFIX, Storage
from topwork.errors import SettingError, UnavailableError

log = structlog.get_logger(__name__)

MAX_PROBE_AGE = timedelta(days=1)
CONTENT = b"This object tests what the storage supports. It can be deleted.\n"
# Operation, why topwork needs it, and what can be done if it is missing.
PURPOSES: dict[str, tuple[str, str]] = {
    "put": ("store results", "Allow s3:PutObject."),
    "conditional put (If-None-Match: *)": (
        "let only one of several writers publish a model version or a dataset",
        "Use a server or a version of it that supports conditional writes.",
    ),
    "get": ("read results", "Allow s3:GetObject."),
    "head": ("find out whether a result exists", "Allow s3:GetObject and s3:ListBucket."),
    "list": ("find checkpoints and versions", "Allow s3:ListBucket on the bucket."),
    "multipart upload": (
        "store files that are larger than 16 MiB",
        "Allow s3:PutObject, and check the limits of a proxy in front of the server.",
    ),
    "abort of a multipart upload": ("free the space of interrupted uploads", "Allow s3:AbortMultipartUpload."),
    "delete": (
        "delete old checkpoints and start over",
        "Allow s3:DeleteObject. Retention rules and object locks must not cover the prefix.",
    ),
}


def check_storage(storage: Storage, report: Callable[[str, float], None] = lambda *_: None) -> None:
    """Check that a storage supports the operations that jobs need. Sends 13 requests and leaves nothing behind.

    Args:
        storage: The storage. What it was found to support is kept in `storage.server`.
        report: Called after each operation with its name and its duration in seconds.

    Raises:
        AccessError: If the credentials are rejected, or do not permit an operation.
        SettingError: If the bucket does not exist, or the server does not support an operation. The message has one
            line for each such operation.
        UnavailableError: If the server can't be reached or fails.

    Example:
        ```python
        check_storage(Storage("s3://ml-artifacts/topwork"))
        ```
    """
    StorageCheck(storage, report).run()


class StorageCheck:
    """One check of a storage; see `check_storage`."""

    def __init__(self, storage: Storage, report: Callable[[str, float], None]) -> None:
        self._storage, self._report, self._server = storage, report, storage.server
        name = f"{PROBE_PREFIX}/{uuid.uuid4().hex}"
        self._plain, self._conditional = storage.target(f"{name}-plain"), storage.target(f"{name}-conditional")
        # Objects of checks that were killed.
        self._old_keys: list[str] = []
        self._failures: list[str] = []
        self._is_denied = self._is_damaged = False

    def run(self) -> None:
        """Run all operations, and raise one error for those that failed."""
        self._run("put", self._put)
        if not self._failures:
            self._run("conditional put (If-None-Match: *)", self._put_conditionally)
            self._run("get", self._get)
            self._run("multipart upload", self._upload_parts)
            self._run("abort of a multipart upload", self._abort_upload)
            self._run("list", self._list)
            self._run("delete", self._delete)
            self._run("head", self._head)
        if self._failures:
            with tolerate_cleanup_failure("objects of the storage check"), self._storage.translate_errors():
                self._server.deletion.delete(self._plain["Bucket"], [self._plain["Key"], self._conditional["Key"]])
            kind = AccessError if self._is_denied else UnavailableError if self._is_damaged else SettingError
            raise kind("\n".join([f"{self._storage.uri} at {self._server.endpoint} can't be used:", *self._failures]))

    def _run(self, name: str, operation: Callable[[], str | None]) -> None:
        """Run an operation, which returns what is wrong with its result, if anything."""
        started = time.monotonic()
        with self._storage.translate_errors():
            try:
                problem = operation()
            except boto.ClientError as error:
                if not _is_unsupported(error):
                    raise
                self._is_denied |= http_status(error) in {401, 403}
                self._is_damaged |= error_code(error) in DAMAGED_REQUEST_CODES
                problem = f"{error_code(error)}: {error.response.get('Error', {}).get('Message') or 'no message'}"
        if problem is None:
            self._report(name, time.monotonic() - started)
        else:
            purpose, hint = PURPOSES[name]
            self._failures.append(f"- {name} failed ({problem}). topwork needs it to {purpose}. {hint}")

    def _put(self) -> None:
        try:
            # A checksum of this kind is sent after the body (as a trailer) over TLS, which some servers do not support.
            checksum = {"ChecksumAlgorithm": "SHA256"} if self._server.uses_checksums else {}
            self._server.client.put_object(**self._plain, Body=CONTENT, **checksum)
        except boto.ClientError as error:
            # Servers that do not expect a trailer can also miscalculate the signature.
            can_be_checksum = _is_unsupported(error) or error_code(error) == "SignatureDoesNotMatch"
            if not (self._server.uses_checksums and can_be_checksum) or error_code(error) == "AccessDenied":
                raise
            self._put_without_checksum(error)

    def _put_without_checksum(self, error: boto.ClientError) -> None:
        request = {**self._plain, "Body": CONTENT}
        unchecked = self._server.without_checksums()
        try:
            unchecked.put_object(**request)
        except boto.ClientError:
            raise error from None
        self._server.disable_checksums()
        log.warning(
            "storage rejects checksums, so uploads are sent without them", storage=self._storage.uri, reason=str(error)
        )

    def _put_conditionally(self) -> str | None:
        request: dict[str, Any] = {**self._conditional, "Body": CONTENT, "IfNoneMatch": "*"}
        if self._server.uses_checksums:
            request["ChecksumSHA256"] = base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()
        if not put_object(self._server, request, lambda: CONTENT):
            return "the server refuses to create a new object"
        if put_object(self._server, request, lambda: None):
            return "the server ignores the condition and replaces an existing object"
        return None

    def _get(self) -> str | None:
        data = self._server.client.get_object(**self._plain)["Body"].read()
        return None if data == CONTENT else f"received {len(data)} different bytes than were stored"

    def _upload_parts(self) -> None:
        with PartUpload(self._server, self._plain) as upload:
            upload.complete([upload.upload(1, io.BytesIO(CONTENT))])

    def _abort_upload(self) -> None:
        with PartUpload(self._server, self._plain) as upload:
            upload.abort()

    def _list(self) -> str | None:
        newest_old = datetime.now(UTC) - MAX_PROBE_AGE
        request = {"Bucket": self._plain["Bucket"], "Prefix": self._storage.target(f"{PROBE_PREFIX}/")["Key"]}
        pages = self._server.client.get_paginator("list_objects_v2").paginate(**request)
        modified = {item["Key"]: item["LastModified"] for page in pages for item in page.get("Contents", ())}
        self._old_keys = [key for key, time_modified in modified.items() if time_modified < newest_old]
        return None if self._plain["Key"] in modified else "the listing lacks an object that was just stored"

    def _delete(self) -> None:
        self._server.client.delete_object(**self._plain)
        keys = [self._conditional["Key"], *self._old_keys][:MAX_BATCH]
        for error in self._server.deletion.delete(self._plain["Bucket"], keys).values():
            raise error

    def _head(self) -> str | None:
        try:
            self._server.client.head_object(**self._conditional)
        except boto.ClientError as error:
            if http_status(error) == 404:
                return None
            self._raise_reason()
            raise
        return "the object still exists after it was deleted"

    def _raise_reason(self) -> None:
        """Raise what is wrong with the whole storage, if anything: the response to a head request has no body."""
        try:
            self._server.client.get_object(**self._conditional)
        except boto.ClientError as error:
            if not _is_unsupported(error):
                raise


def _is_unsupported(error: boto.ClientError) -> bool:
    """Whether a server or its permissions rule out an operation. Other errors concern the whole storage."""
    if error_code(error) in ERRORS_BY_CODE.keys() - DAMAGED_REQUEST_CODES - {"404", "NoSuchKey"}:
        return False
    return http_status(error) == 501 or (http_status(error) < 500 and not is_temporary_status(http_status(error)))
