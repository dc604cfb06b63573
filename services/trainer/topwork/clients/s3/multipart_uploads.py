"""Multipart uploads that were begun and not ended; a part of `edge.storage`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from botocore import exceptions as boto

from topwork.clients.s3.errors import code_of, status_of


@dataclass(frozen=True)
class UnfinishedUpload:
    """A multipart upload that was begun; what was sent of it takes room until it is given back.

    Attributes:
        key: Key that the object would have.
        identifier: What the server calls the upload.
        begun: When, as the server's clock tells it.
    """

    key: str
    identifier: str
    begun: datetime


class Uploads:
    """The unfinished uploads of a storage.

    Args:
        client: S3 client.
        bucket: Bucket of the storage.
        base: Beginning of all its keys.
        told: Turns errors of botocore into errors of topwork, for a key.
    """

    def __init__(
        self, client: Any, bucket: str, base: str, told: Callable[[str], AbstractContextManager[None]]
    ) -> None:
        self._client, self._bucket, self._base, self._told = client, bucket, base, told

    def unfinished(self, prefix: str = "", older_than_seconds: float = 86400.0) -> Sequence[UnfinishedUpload]:
        """List those that are there, such as those of killed processes.

        Args:
            prefix: Beginning of the keys, relative to the storage.
            older_than_seconds: Leave younger ones out: another process may be writing them.

        Returns:
            The uploads; none where the server does not tell or the account may not ask.
        """
        begun_before = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        pages = self._client.get_paginator("list_multipart_uploads")
        found = []
        with self._told(prefix), _courtesy():
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._base + prefix):
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"] <= begun_before:
                        key = upload["Key"][len(self._base) :]
                        found.append(UnfinishedUpload(key, upload["UploadId"], upload["Initiated"]))
        return found

    def size_of(self, upload: UnfinishedUpload) -> int:
        """Return how many bytes of an unfinished upload the server holds; 0 where it does not tell."""
        pages, size = self._client.get_paginator("list_parts"), 0
        where = {"Bucket": self._bucket, "Key": self._base + upload.key, "UploadId": upload.identifier}
        with self._told(upload.key), _courtesy():
            for page in pages.paginate(**where):
                size += sum(part["Size"] for part in page.get("Parts", ()))
        return size

    def abort(self, uploads: Iterable[UnfinishedUpload]) -> int:
        """Give back what unfinished uploads hold.

        Args:
            uploads: The uploads.

        Returns:
            How many were given back; 0 where the account may not.
        """
        aborted = 0
        for upload in uploads:
            where = {"Key": self._base + upload.key, "UploadId": upload.identifier}
            with self._told(upload.key), _courtesy():
                self._client.abort_multipart_upload(Bucket=self._bucket, **where)
                aborted += 1
        return aborted

    def abort_unfinished(self, prefix: str = "", older_than_seconds: float = 86400.0) -> int:
        """Give back what those of killed processes hold.

        Args:
            prefix: Beginning of the keys, relative to the storage.
            older_than_seconds: Leave younger ones alone: another process may be writing them.

        Returns:
            How many were aborted; 0 where the server does not tell or the account may not ask.
        """
        return self.abort(self.unfinished(prefix, older_than_seconds))


@contextmanager
def _courtesy() -> Iterator[None]:
    """Do without what a server does not offer or an account may not: cleaning must fail no run."""
    try:
        yield
    except boto.ClientError as error:
        if status_of(error) not in {403, 404, 405, 501} or code_of(error) == "NoSuchBucket":
            raise
