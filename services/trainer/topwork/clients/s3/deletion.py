"""Deletes objects: in batches, or one by one on a server that does not support batches."""

import base64
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import structlog
from botocore import exceptions as boto

from topwork.clients.s3.errors import DAMAGED_REQUEST_CODES, ERRORS_BY_CODE, error_code, http_status

log = structlog.get_logger(__name__)

# Maximum number of objects per batch (limit of the S3 API).
MAX_BATCH = 1000
MAX_CONCURRENT = 8
# Responses of servers that do not support DeleteObjects, or not in this form.
UNSUPPORTED_STATUSES = frozenset({400, 404, 405, 411, 415, 422, 501})

DeletionMode = Literal["batch", "batch with Content-MD5", "single"]
MODES: tuple[DeletionMode, ...] = ("batch", "batch with Content-MD5", "single")


class ObjectDeletion:
    """Deletes objects with one S3 client, and remembers which form of deletion its server supports. Thread-safe.

    Attributes:
        mode: Form that is tried next.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self.mode: DeletionMode = "batch"
        # DeleteObjects has a checksum anyway, but some servers require this older header.
        client.meta.events.register("before-call.s3.DeleteObjects", self._add_content_md5)

    def delete(self, bucket: str, keys: Sequence[str]) -> dict[str, boto.ClientError]:
        """Delete up to `MAX_BATCH` objects. Keys that do not exist are ignored.

        Args:
            bucket: The bucket.
            keys: Complete keys.

        Returns:
            Keys that could not be deleted, with the reason.

        Raises:
            botocore.exceptions.BotoCoreError: If the server can't be reached.
            botocore.exceptions.ClientError: If the server rejects a batch, but not because it lacks support for it.
        """
        while (mode := self.mode) != "single":
            try:
                return self._delete_batch(bucket, keys)
            except boto.ClientError as error:
                if not _is_unsupported(error):
                    raise
                self._use_next_mode(mode, error)
        return self._delete_singly(bucket, keys)

    def _use_next_mode(self, rejected: DeletionMode, error: boto.ClientError) -> None:
        # Another thread may have noticed it first.
        if self.mode == rejected:
            self.mode = MODES[MODES.index(rejected) + 1]
            log.info("storage rejects DeleteObjects", mode=rejected, next_mode=self.mode, code=error_code(error))

    def _delete_batch(self, bucket: str, keys: Sequence[str]) -> dict[str, boto.ClientError]:
        objects = [{"Key": key} for key in keys]
        response = self._client.delete_objects(Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
        failures, retried = {}, []
        for error in response.get("Errors", ()):
            key, code = str(error.get("Key")), error.get("Code")
            if code == "AccessDenied":
                metadata = {"HTTPStatusCode": 403}
                failures[key] = boto.ClientError({"Error": error, "ResponseMetadata": metadata}, "DeleteObjects")
            elif code not in {"NoSuchKey", "NoSuchVersion"}:
                retried.append(key)
        # A single request is retried, and its response has a status.
        return failures | self._delete_singly(bucket, retried)

    def _delete_singly(self, bucket: str, keys: Sequence[str]) -> dict[str, boto.ClientError]:
        def delete(key: str) -> boto.ClientError | None:
            try:
                self._client.delete_object(Bucket=bucket, Key=key)
            except boto.ClientError as error:
                is_missing = http_status(error) == 404 and error_code(error) != "NoSuchBucket"
                return None if is_missing else error
            return None

        if not keys:
            return {}
        with ThreadPoolExecutor(min(MAX_CONCURRENT, len(keys)), thread_name_prefix="deletion") as pool:
            errors = list(pool.map(delete, keys))
        return {key: error for key, error in zip(keys, errors, strict=True) if error is not None}

    def _add_content_md5(self, params: dict[str, Any], **_: object) -> None:
        if self.mode == "batch with Content-MD5":
            digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
            params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


def _is_unsupported(error: boto.ClientError) -> bool:
    code = error_code(error)
    if code in ERRORS_BY_CODE and code not in DAMAGED_REQUEST_CODES | {"404"}:
        return False
    return http_status(error) in UNSUPPORTED_STATUSES
