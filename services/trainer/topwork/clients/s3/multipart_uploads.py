"""Multipart uploads that never completed: listing and aborting them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from botocore import exceptions as boto

from topwork.clients.s3.cleanup import tolerate_cleanup_failure
from topwork.clients.s3.errors import error_code, http_status


@dataclass(frozen=True)
class IncompleteUpload:
    """A multipart upload that was started but not completed. Its parts occupy space until it is aborted.

    Attributes:
        key: Key of the object, relative to the storage.
        upload_id: Upload ID that the server assigned.
        started: Start time, by the server's clock.
    """

    key: str
    upload_id: str
    started: datetime


class MultipartUploads:
    """The incomplete multipart uploads of a storage.

    Args:
        client: S3 client.
        bucket: Bucket of the storage.
        key_prefix: Prefix of all keys of the storage.
        translate_errors: Returns a context manager that translates botocore exceptions for a key.
    """

    def __init__(
        self,
        client: Any,
        bucket: str,
        key_prefix: str,
        translate_errors: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._client, self._bucket, self._key_prefix = client, bucket, key_prefix
        self._translate_errors = translate_errors

    def list_incomplete(self, prefix: str = "", older_than_seconds: float = 86400.0) -> Sequence[IncompleteUpload]:
        """List incomplete uploads, such as those of killed processes.

        Args:
            prefix: Prefix of the keys, relative to the storage.
            older_than_seconds: Minimum age. Another process may still be writing a newer upload.

        Returns:
            The uploads; empty if the server does not support the request or denies access.
        """
        started_before = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        paginator = self._client.get_paginator("list_multipart_uploads")
        uploads = []
        with self._translate_errors(prefix), _ignore_unsupported():
            for page in paginator.paginate(Bucket=self._bucket, Prefix=self._key_prefix + prefix):
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"] <= started_before:
                        key = upload["Key"][len(self._key_prefix) :]
                        uploads.append(IncompleteUpload(key, upload["UploadId"], upload["Initiated"]))
        return uploads

    def uploaded_bytes(self, upload: IncompleteUpload) -> int:
        """Return the total size of the uploaded parts in bytes; 0 if the server does not report it."""
        paginator, size = self._client.get_paginator("list_parts"), 0
        with self._translate_errors(upload.key), _ignore_unsupported():
            for page in paginator.paginate(**self._request(upload)):
                size += sum(part["Size"] for part in page.get("Parts", ()))
        return size

    def abort(self, uploads: Iterable[IncompleteUpload]) -> int:
        """Abort incomplete uploads, which deletes their parts.

        Args:
            uploads: The uploads.

        Returns:
            Number of aborted uploads; 0 if access is denied.
        """
        aborted = 0
        for upload in uploads:
            with self._translate_errors(upload.key), _ignore_unsupported():
                self._client.abort_multipart_upload(**self._request(upload))
                aborted += 1
        return aborted

    def abort_incomplete(self, prefix: str = "", older_than_seconds: float = 86400.0, *, containing: str = "") -> int:
        """Abort all incomplete uploads that have reached a minimum age. A failure is logged as a warning.

        Args:
            prefix: Prefix of the keys, relative to the storage.
            older_than_seconds: Minimum age. Another process may still be writing a newer upload.
            containing: Text that the keys contain, relative to the storage.

        Returns:
            Number of aborted uploads; 0 if the server does not support the request or denies access.
        """
        with tolerate_cleanup_failure("incomplete uploads"):
            uploads = self.list_incomplete(prefix, older_than_seconds)
            return self.abort(upload for upload in uploads if containing in upload.key)
        return 0

    def _request(self, upload: IncompleteUpload) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._key_prefix + upload.key, "UploadId": upload.upload_id}


@contextmanager
def _ignore_unsupported() -> Iterator[None]:
    """Ignore requests that the server does not support or denies: cleanup must not fail a run."""
    try:
        yield
    except boto.ClientError as error:
        if http_status(error) not in {403, 404, 405, 501} or error_code(error) == "NoSuchBucket":
            raise
