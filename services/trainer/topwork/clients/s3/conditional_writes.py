"""Writes that never replace an object: of several concurrent writers of a key, only the first one succeeds."""

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from botocore import exceptions as boto

from topwork.clients.s3.errors import error_code, http_status
from topwork.clients.s3.objects import FileEntry
from topwork.clients.s3.server import Server

CONFLICT_RETRY_SECONDS = (0.1, 0.3, 1.0)
# Limit of the S3 API for one request.
MAX_PUT_BYTES = 5 << 30
# Metadata of an object with the digest of its content: an ETag is not the digest of encrypted or multipart objects.
DIGEST_METADATA = "sha256"


def put_object(server: Server, request: dict[str, Any], read: Callable[[], bytes | None]) -> bool:
    """Send PutObject, and interpret the outcome of its If-None-Match condition, if any.

    Args:
        server: The server.
        request: Parameters of the request, with the content as bytes.
        read: Reads the object.

    Returns:
        Whether the object was written; False if it already existed.

    Raises:
        botocore.exceptions.BotoCoreError: If the server can't be reached.
        botocore.exceptions.ClientError: If the server rejects the request for another reason.
    """
    for delay_seconds in (*CONFLICT_RETRY_SECONDS, None):
        try:
            server.client.put_object(**request)
        except boto.ClientError as error:
            if http_status(error) == 412:
                # If the response to the first attempt was lost, the object may be this writer's own.
                is_retry = error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                return bool(is_retry and read() == request["Body"])
            # 409: a concurrent write is in progress. Only another attempt shows whether it succeeded.
            if error_code(error) != "ConditionalRequestConflict" or delay_seconds is None:
                raise
            server.counter.count_storage_retry()
            time.sleep(delay_seconds)
        else:
            return True
    raise AssertionError("the last attempt returns or raises")


class FileCreation:
    """Creates an object with the content of a file, unless the key already exists.

    The file is sent in one request: servers evaluate the condition of a put atomically, but some, such as SeaweedFS
    4.48, let two concurrent uploads in parts both complete under the same condition.
    """

    def __init__(self, server: Server, target: dict[str, str], path: Path, entry: FileEntry) -> None:
        """Prepare the creation.

        Args:
            server: The server.
            target: Bucket and key of the object.
            path: The file.
            entry: Its size and digest.
        """
        self._server, self._target, self._path, self._entry = server, target, path, entry

    def run(self) -> bool:
        """Create the object.

        Returns:
            Whether the object has the content of the file. Another writer may have created it.

        Raises:
            botocore.exceptions.BotoCoreError: If the server can't be reached.
            botocore.exceptions.ClientError: If the server rejects a request for a reason other than an existing object
                or the size of the file.
        """
        for delay_seconds in (*CONFLICT_RETRY_SECONDS, None):
            try:
                return self._send()
            except boto.ClientError as error:
                if not _is_conflict(error):
                    raise
                if self._exists():
                    return True
                # 409: a concurrent write. Only another attempt shows whether it succeeded.
                if http_status(error) != 409 or delay_seconds is None:
                    return False
            self._server.counter.count_storage_retry()
            time.sleep(delay_seconds)
        raise AssertionError("the last attempt returns or raises")

    def _send(self) -> bool:
        if self._entry.size > MAX_PUT_BYTES:
            return self._exists()
        self._put()
        return True

    def _put(self) -> None:
        request: dict[str, Any] = {**self._target, "IfNoneMatch": "*", "ContentLength": self._entry.size}
        if self._server.uses_checksums:
            request["ChecksumSHA256"] = base64.b64encode(bytes.fromhex(self._entry.sha256)).decode()
        with self._path.open("rb") as file:
            metadata = {DIGEST_METADATA: self._entry.sha256}
            self._server.client.put_object(**request, Body=file, Metadata=metadata)
        self._server.counter.count_storage_bytes("upload", self._entry.size)

    def _exists(self) -> bool:
        """Whether the object exists with the content of the file."""
        try:
            head = self._server.client.head_object(**self._target)
        except boto.ClientError as error:
            if http_status(error) == 404:
                return False
            raise
        is_same = head.get("Metadata", {}).get(DIGEST_METADATA) == self._entry.sha256
        return bool(is_same and head["ContentLength"] == self._entry.size)


def _is_conflict(error: boto.ClientError) -> bool:
    """Whether a request failed because the object exists, is being written, or is too large for one request."""
    return http_status(error) in {409, 412, 413} or error_code(error) == "EntityTooLarge"
