"""Object storage over S3: the only module that speaks it.

Every key is relative to the URI of its `Storage`. What botocore raises leaves as `SettingError`, `UnavailableError`
or `DataError`; `edge.storage_errors` says which.
"""

import base64
import hashlib
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from boto3.s3.transfer import ProgressCallbackInvoker, TransferConfig, create_transfer_manager
from botocore import exceptions as boto
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from topwork.clients.s3.connection import FROM_ENVIRONMENT, Meter, StorageSettings, Unmetered, connect, make_bucket
from topwork.clients.s3.errors import code_of, refused, status_of, told
from topwork.clients.s3.multipart_uploads import UnfinishedUpload, Uploads
from topwork.clients.s3.objects import NEVER, FileEntry, StoredObject, entry_of, split
from topwork.disk_space import room_told
from topwork.errors import DamagedError, UnavailableError

__all__ = [
    "NEVER",
    "FileEntry",
    "Meter",
    "Storage",
    "StorageSettings",
    "StoredObject",
    "UnfinishedUpload",
    "entry_of",
    "make_bucket",
]

# Objects that one request lists or deletes at most (limit of the S3 interface).
REQUEST_OBJECTS = 1000
# As s3transfer reads downloads: an answer that is slower than one piece in a time-out is given up.
PIECE_BYTES = 1 << 18
PARALLEL_PARTS = 8


class BrokenBodyError(boto.HTTPClientError):
    """The answer began well, and its body broke off or arrived damaged."""

    fmt = "the answer broke off: {error}"


class Storage:
    """A folder in object storage. Safe to use from several threads.

    Args:
        uri: s3://bucket or s3://bucket/prefix.
        settings: Server and credentials.
        meter: Counts bytes and retries.

    Raises:
        SettingError: If the URI, the profile or the endpoint is not one.
    """

    def __init__(self, uri: str, settings: StorageSettings = FROM_ENVIRONMENT, meter: Meter | None = None) -> None:
        self.uri = uri.rstrip("/")
        self._bucket, self._base = split(uri)
        self._settings = settings
        self._meter: Meter = meter or Unmetered()
        self._client = connect(settings, self._meter)

    def uri_of(self, key: str) -> str:
        """Return the s3:// URI of a key."""
        return f"{self.uri}/{key}"

    def at(self, uri: str) -> "Storage":
        """Return storage at another URI, over the same connections.

        Args:
            uri: s3://bucket or s3://bucket/prefix.

        Raises:
            SettingError: If the URI is not one.
        """
        other = object.__new__(Storage)
        other.__dict__.update(self.__dict__)
        other.uri = uri.rstrip("/")
        other._bucket, other._base = split(uri)
        return other

    def check(self) -> None:
        """Ask the server once, so that a wrong setting is told before any work.

        Raises:
            SettingError: If the bucket is missing or the credentials are refused.
            UnavailableError: If the server can't be reached.
        """
        # Not HeadBucket: its answer has no body, so a wrong key and a wrong secret would look the same.
        with self._told():
            self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._base, MaxKeys=1)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """List the objects whose key begins with `prefix`, in the order of the server.

        Args:
            prefix: Beginning of the keys, relative to `uri`.

        Yields:
            Objects; their keys are relative to `uri`.
        """
        pages = self._client.get_paginator("list_objects_v2")
        with self._told(prefix):
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._base + prefix):
                for found in page.get("Contents", ()):
                    key, etag = found["Key"][len(self._base) :], found.get("ETag", "").strip('"')
                    yield StoredObject(key, found["Size"], etag, found["LastModified"])

    def size(self, key: str) -> int | None:
        """Return the size of an object in bytes; None if it is not there."""
        with self._told(key):
            try:
                return int(self._client.head_object(Bucket=self._bucket, Key=self._base + key)["ContentLength"])
            except boto.ClientError as error:
                if status_of(error) == 404 and code_of(error) != "NoSuchBucket":
                    return None
                raise

    def read(self, key: str) -> bytes | None:
        """Return a small object as bytes; None if it is not there."""
        with self._told(key):
            # botocore's own retries end with the header of an answer; its body can still break off.
            for attempt in Retrying(
                retry=retry_if_exception_type(BrokenBodyError),
                stop=stop_after_attempt(self._settings.attempts),
                wait=wait_random_exponential(multiplier=0.1, max=5),
                before_sleep=lambda _: self._meter.storage_retry(),
                reraise=True,
            ):
                with attempt:
                    data = self._get(key)
        if data is not None:
            self._meter.storage_bytes("download", len(data))
        return data

    def _get(self, key: str) -> bytes | None:
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._base + key)
        except boto.ClientError as error:
            if code_of(error) == "NoSuchKey":
                return None
            raise
        # Not `with answer["Body"]`: that hands out the bare stream, without checksum and length checked.
        with closing(answer["Body"]) as body:
            try:
                # In pieces, so that it can be told whether it goes on.
                return b"".join(iter(partial(body.read, PIECE_BYTES), b""))
            except (boto.HTTPClientError, boto.IncompleteReadError, boto.FlexibleChecksumError) as error:
                raise BrokenBodyError(error=error) from error

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False, content_type: str | None = None) -> bool:
        """Store a small object.

        Two writers with `only_if_absent` can't both be told True, unless their bytes are the same: a writer whose
        answer was lost knows its own work by its bytes.

        Args:
            key: Key of the object.
            data: All of its bytes.
            only_if_absent: Leave an object that is there already as it is.
            content_type: Media type, such as application/json.

        Returns:
            False if the object was there already.
        """
        request: dict[str, Any] = {"Bucket": self._bucket, "Key": self._base + key, "Body": data}
        if self._checksums:
            request["ChecksumSHA256"] = base64.b64encode(hashlib.sha256(data).digest()).decode()
        if only_if_absent:
            request["IfNoneMatch"] = "*"
        if content_type:
            request["ContentType"] = content_type
        with self._told(key):
            written = self._put(key, request)
        if written:
            self._meter.storage_bytes("upload", len(data))
        return written

    def _put(self, key: str, request: dict[str, Any]) -> bool:
        for pause_seconds in (0.1, 0.3, 1.0, None):
            try:
                self._client.put_object(**request)
            except boto.ClientError as error:
                if status_of(error) == 412:
                    sent_before = error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                    return bool(sent_before and self.read(key) == request["Body"])
                # 409: another write was under way. Whether it took hold, only another try can tell.
                if code_of(error) != "ConditionalRequestConflict" or pause_seconds is None:
                    raise
                self._meter.storage_retry()
                time.sleep(pause_seconds)
            else:
                return True
        raise AssertionError("the last pause is None")

    def upload(self, path: Path, key: str) -> FileEntry:
        """Store a file, in parallel parts when it is large.

        Args:
            path: Local file.
            key: Key of the object.

        Returns:
            Size and digest of the file.

        Raises:
            UnavailableError: If the stored size is not that of the file.
        """
        entry = entry_of(path)
        extra = {"ChecksumAlgorithm": "SHA256"} if self._checksums else {}
        with self._told(key), self._transfers() as transfers:
            counted = self._counted("upload")
            transfers.upload(str(path), self._bucket, self._base + key, extra, counted).result()
        if (stored := self.size(key)) != entry.size:
            raise UnavailableError(
                f"{self.uri_of(key)} holds {stored} bytes after the upload of {path} with {entry.size}: "
                "the file changed meanwhile, or another writer uses the key. Try again."
            )
        return entry

    def download(self, key: str, path: Path, expected: FileEntry | None = None) -> FileEntry:
        """Fetch an object to a file that appears whole or not at all.

        Args:
            key: Key of the object.
            path: Local file; its folder is made, and a file of that name replaced.
            expected: What the file must be; anything else is fetched once more and then refused.

        Returns:
            Size and digest of the file.

        Raises:
            DataError: If the object does not exist.
            DamagedError: If what arrives is not what was expected.
            UnavailableError: If storage can't be reached, or the disk is full.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        try:
            # A full disk is no damage of what is stored: who asks must be able to tell the two apart.
            with room_told(path.parent):
                entry = self._fetch(key, part)
            if expected and entry != expected:
                self._meter.storage_retry()
                entry = self._fetch(key, part)
            if expected and entry != expected:
                raise DamagedError(
                    f"{self.uri_of(key)} is not what its manifest says: expected {expected.size} bytes with SHA-256 "
                    f"{expected.sha256}, got {entry.size} bytes with {entry.sha256}. It was damaged or replaced: "
                    "try again, and delete it with its manifest if this stays so."
                )
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return entry

    def _fetch(self, key: str, part: Path) -> FileEntry:
        with self._told(key), part.open("wb") as file, self._transfers() as transfers:
            transfers.download(self._bucket, self._base + key, file, None, self._counted("download")).result()
        return entry_of(part)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are not there count as deleted.

        Args:
            keys: Keys of the objects.
        """
        remaining = iter(keys)
        while batch := [{"Key": self._base + key} for key in islice(remaining, REQUEST_OBJECTS)]:
            with self._told():
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": batch, "Quiet": True})
            for error in answer.get("Errors", ()):
                target = f"s3://{self._bucket}/{error.get('Key')}"
                status = {"HTTPStatusCode": 403 if error.get("Code") == "AccessDenied" else 500}
                failure = boto.ClientError({"Error": error, "ResponseMetadata": status}, "DeleteObjects")
                raise refused(failure, self._endpoint, self._bucket, target)

    @property
    def uploads(self) -> Uploads:
        """Multipart uploads that were begun below `uri` and not ended."""
        return Uploads(self._client, self._bucket, self._base, self._told)

    @property
    def _endpoint(self) -> str:
        return str(self._client.meta.endpoint_url)

    @property
    def _checksums(self) -> bool:
        # The user turns them off (AWS_REQUEST_CHECKSUM_CALCULATION) for servers that don't know them.
        return bool(self._client.meta.config.request_checksum_calculation != "when_required")

    @contextmanager
    def _told(self, key: str = "") -> Iterator[None]:
        with told(self._endpoint, self._bucket, self.uri_of(key) if key else self.uri):
            try:
                yield
            except boto.ClientError as error:
                if error.operation_name == "HeadObject" and status_of(error) in {400, 403}:
                    # The answer to a HEAD has no body: another request learns what is wrong.
                    self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._base + key, MaxKeys=1)
                raise

    def _transfers(self) -> Any:
        part = self._settings.part_bytes
        plan = TransferConfig(
            multipart_threshold=part,
            multipart_chunksize=part,
            max_concurrency=PARALLEL_PARTS,
            # The other client, chosen by itself on some machines, neither counts nor retries as this module says.
            preferred_transfer_client="classic",
        )
        return create_transfer_manager(self._client, plan)

    def _counted(self, direction: str) -> Any:
        return [ProgressCallbackInvoker(lambda count: self._meter.storage_bytes(direction, count))]
