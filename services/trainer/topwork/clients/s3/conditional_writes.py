"""Writes that never replace an object: of several concurrent writers of a key, only the first one succeeds."""

import base64
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from botocore import exceptions as boto
from s3transfer.utils import ReadFileChunk

from topwork.clients.s3.errors import error_code, http_status
from topwork.clients.s3.objects import FileEntry
from topwork.clients.s3.part_upload import Part, PartUpload
from topwork.clients.s3.server import Server

CONFLICT_RETRY_SECONDS = (0.1, 0.3, 1.0)
CONCURRENT_PARTS = 8
# Limits of the S3 API for one request, and for the number of parts.
MAX_PUT_BYTES = 5 << 30
MAX_PARTS = 10_000
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
    """Creates an object with the content of a file, unless the key already exists."""

    def __init__(self, server: Server, target: dict[str, str], path: Path, entry: FileEntry, probe_key: str) -> None:
        """Prepare the creation.

        Args:
            server: The server.
            target: Bucket and key of the object.
            path: The file.
            entry: Its size and digest.
            probe_key: Unused key in the same bucket, for a test of the server before its first large file.
        """
        self._server, self._path, self._entry = server, path, entry
        self._target, self._probe = target, {**target, "Key": probe_key}

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
                # 409, or 404 for the upload: a concurrent write. Only another attempt shows whether it succeeded.
                if http_status(error) not in {404, 409} or delay_seconds is None:
                    return False
            self._server.counter.count_storage_retry()
            time.sleep(delay_seconds)
        raise AssertionError("the last attempt returns or raises")

    def _send(self) -> bool:
        if self._entry.size >= self._server.settings.part_bytes and self._has_conditional_completion():
            with PartUpload(self._server, self._target, {DIGEST_METADATA: self._entry.sha256}) as upload:
                upload.complete(self._upload_parts(upload), only_if_absent=True)
        elif self._entry.size <= MAX_PUT_BYTES:
            self._put()
        else:
            return self._exists()
        return True

    def _put(self) -> None:
        request: dict[str, Any] = {**self._target, "IfNoneMatch": "*", "ContentLength": self._entry.size}
        if self._server.uses_checksums:
            request["ChecksumSHA256"] = base64.b64encode(bytes.fromhex(self._entry.sha256)).decode()
        with self._path.open("rb") as file:
            metadata = {DIGEST_METADATA: self._entry.sha256}
            self._server.client.put_object(**request, Body=file, Metadata=metadata)
        self._server.counter.count_storage_bytes("upload", self._entry.size)

    def _upload_parts(self, upload: PartUpload) -> list[Part]:
        part_bytes = max(self._server.settings.part_bytes, -(-self._entry.size // MAX_PARTS))

        def upload_part(number: int) -> Part:
            with ReadFileChunk.from_filename(str(self._path), (number - 1) * part_bytes, part_bytes) as chunk:
                part = upload.upload(number, chunk)
                self._server.counter.count_storage_bytes("upload", len(chunk))
            return part

        count = -(-self._entry.size // part_bytes)
        with ThreadPoolExecutor(min(CONCURRENT_PARTS, count), thread_name_prefix="parts") as pool:
            try:
                return list(pool.map(upload_part, range(1, count + 1)))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

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

    def _has_conditional_completion(self) -> bool:
        """Whether the server honors the condition. A server that ignores it would replace the object silently."""
        if self._server.has_conditional_completion is None:
            self._server.client.put_object(**self._probe, Body=b"existing")
            try:
                with PartUpload(self._server, self._probe) as upload:
                    part = upload.upload(1, io.BytesIO(b"new"))
                    self._server.has_conditional_completion = upload.refuses_to_replace([part])
            finally:
                self._server.deletion.delete(self._probe["Bucket"], [self._probe["Key"]])
        return self._server.has_conditional_completion


def _is_conflict(error: boto.ClientError) -> bool:
    """Whether a request failed because the object exists, is being written, or is too large for one request."""
    if error_code(error) == "NoSuchBucket":
        return False
    return http_status(error) in {404, 409, 412, 413} or error_code(error) == "EntityTooLarge"
