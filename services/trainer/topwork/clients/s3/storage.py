"""Object storage over S3: reads, writes, lists, uploads, downloads and deletes objects below an s3:// URI.

Keys are relative to the URI of their `Storage`. botocore exceptions are translated into errors of topwork; see
`topwork.clients.s3.errors`.
"""

import base64
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from boto3.s3.transfer import ProgressCallbackInvoker, TransferConfig, create_transfer_manager
from botocore import exceptions as boto
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from topwork.clients.s3.conditional_writes import DIGEST_METADATA, FileCreation, put_object
from topwork.clients.s3.connection import NullTransferCounter, StorageSettings, TransferCounter, create_bucket
from topwork.clients.s3.deletion import MAX_BATCH
from topwork.clients.s3.errors import error_code, error_from_response, http_status, translate_errors
from topwork.clients.s3.multipart_uploads import IncompleteUpload, MultipartUploads
from topwork.clients.s3.objects import MIN_TIME, FileEntry, StoredObject, describe_file, partial_path, write_chunks
from topwork.clients.s3.server import Server
from topwork.disk_space import report_full_disk
from topwork.errors import DamagedError, SettingError, UnavailableError

__all__ = [
    "MIN_TIME",
    "FileEntry",
    "IncompleteUpload",
    "Storage",
    "StorageSettings",
    "StoredObject",
    "TransferCounter",
    "create_bucket",
    "describe_file",
    "partial_path",
]

# Prefix of the objects that test what the server supports.
PROBE_PREFIX = ".topwork-check"
CONCURRENT_PARTS = 8
# Read size of s3transfer for downloads. A response slower than one chunk per timeout counts as stalled.
CHUNK_BYTES = 1 << 18

Content = TypeVar("Content")


class TruncatedBodyError(boto.HTTPClientError):
    """The response started correctly, but its body was truncated or damaged."""

    fmt = "truncated response: {error}"


class Storage:
    """Objects below an s3:// URI. Thread-safe.

    Args:
        uri: s3://bucket or s3://bucket/prefix.
        settings: Address and credentials of the server; None uses the AWS variables, files and roles.
        counter: Counts bytes and retries.

    Attributes:
        uri: The URI, without a slash at the end.
        server: The server, shared with all storages that `at` returns.

    Raises:
        SettingError: If the URI, the AWS profile or the endpoint is invalid.

    Example:
        ```python
        storage = Storage("s3://ml-artifacts/topwork")
        storage.write("runs/cats-0f1e2d3c/note.txt", b"hello")
        storage.read("runs/cats-0f1e2d3c/note.txt")  # b"hello"
        ```
    """

    def __init__(
        self, uri: str, settings: StorageSettings | None = None, counter: TransferCounter | None = None
    ) -> None:
        self.uri = uri.rstrip("/")
        self._bucket, self._key_prefix = _parse_uri(uri)
        self._settings = settings or StorageSettings()
        self._counter = counter or NullTransferCounter()
        self.server = Server(self._settings, self._counter)

    def uri_of(self, key: str) -> str:
        """Return the s3:// URI of a key."""
        return f"{self.uri}/{key}"

    def at(self, uri: str) -> "Storage":
        """Return a storage at another URI that shares the connections of this one.

        Args:
            uri: s3://bucket or s3://bucket/prefix.

        Raises:
            SettingError: If the URI is invalid.
        """
        other = object.__new__(Storage)
        other.__dict__.update(self.__dict__)
        other.uri = uri.rstrip("/")
        other._bucket, other._key_prefix = _parse_uri(uri)
        return other

    def check(self) -> None:
        """Send one request, so that wrong settings are reported before any work starts.

        Raises:
            SettingError: If the bucket does not exist or the credentials are rejected.
            UnavailableError: If the server can't be reached.
        """
        # Not HeadBucket: its response has no body, so a wrong key and a wrong secret would look the same.
        with self.translate_errors():
            self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._key_prefix, MaxKeys=1)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """List the objects whose key begins with `prefix`, in the order of the server.

        Args:
            prefix: Prefix of the keys, relative to `uri`.

        Yields:
            The objects, with keys relative to `uri`.
        """
        paginator = self._client.get_paginator("list_objects_v2")
        with self.translate_errors(prefix):
            for page in paginator.paginate(Bucket=self._bucket, Prefix=self._key_prefix + prefix):
                for item in page.get("Contents", ()):
                    key, etag = item["Key"][len(self._key_prefix) :], item.get("ETag", "").strip('"')
                    yield StoredObject(key, item["Size"], etag, item["LastModified"])

    def size(self, key: str) -> int | None:
        """Return the size of an object in bytes; None if it does not exist."""
        with self.translate_errors(key):
            try:
                return int(self._client.head_object(Bucket=self._bucket, Key=self._key_prefix + key)["ContentLength"])
            except boto.ClientError as error:
                if http_status(error) == 404 and error_code(error) != "NoSuchBucket":
                    return None
                raise

    def read(self, key: str) -> bytes | None:
        """Return the content of a small object; None if it does not exist."""
        with self.translate_errors(key):
            try:
                data = self._get(key, b"".join)
            except boto.ClientError as error:
                if error_code(error) == "NoSuchKey":
                    return None
                raise
        self._counter.count_storage_bytes("download", len(data))
        return data

    def _get(self, key: str, consume: Callable[[Iterator[bytes]], Content]) -> Content:
        """Send GetObject, and again if the body is truncated.

        Args:
            key: Key of the object.
            consume: Reads the body in chunks.

        Returns:
            The result of `consume` for a complete body.
        """
        # botocore's own retries cover the response headers only; the body can still be truncated.
        for attempt in Retrying(
            retry=retry_if_exception_type(TruncatedBodyError),
            stop=stop_after_attempt(self._settings.attempts),
            wait=wait_random_exponential(multiplier=0.1, max=5),
            before_sleep=lambda _: self._counter.count_storage_retry(),
            reraise=True,
        ):
            with attempt:
                response = self._client.get_object(**self.target(key))
                # Not `with response["Body"]`: that returns the raw stream, whose checksum and length are not verified.
                with closing(response["Body"]) as body:
                    try:
                        # Read in chunks, so that the stall detection sees progress.
                        return consume(iter(partial(body.read, CHUNK_BYTES), b""))
                    except (boto.HTTPClientError, boto.IncompleteReadError, boto.FlexibleChecksumError) as error:
                        raise TruncatedBodyError(error=error) from error
        raise AssertionError("the last attempt returns or raises")

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False, content_type: str | None = None) -> bool:
        """Write a small object.

        Of two concurrent writers with `only_if_absent`, only one gets True, unless both write the same bytes: a writer
        whose response was lost recognizes its own object by the content.

        Args:
            key: Key of the object.
            data: Content of the object.
            only_if_absent: Whether to leave an existing object unchanged.
            content_type: Media type, such as application/json.

        Returns:
            Whether the object was written; False if it already existed.
        """
        request: dict[str, Any] = {"Bucket": self._bucket, "Key": self._key_prefix + key, "Body": data}
        if self.server.uses_checksums:
            request["ChecksumSHA256"] = base64.b64encode(hashlib.sha256(data).digest()).decode()
        if only_if_absent:
            request["IfNoneMatch"] = "*"
        if content_type:
            request["ContentType"] = content_type
        with self.translate_errors(key):
            is_written = put_object(self.server, request, lambda: self.read(key))
        if is_written:
            self._counter.count_storage_bytes("upload", len(data))
        return is_written

    def create(self, path: Path, key: str, entry: FileEntry) -> bool:
        """Create an object with the content of a file, unless the key already exists. Never replaces an object.

        Args:
            path: Local file.
            key: Key of the object.
            entry: Size and digest of the file.

        Returns:
            Whether the object has the content of the file. If not, another writer created it, or the server can't
            create an object of this size conditionally.
        """
        with self.translate_errors(key):
            return FileCreation(self.server, self.target(key), path, entry).run()

    def upload(self, path: Path, key: str) -> FileEntry:
        """Upload a file, in concurrent parts if it is large.

        Args:
            path: Local file.
            key: Key of the object.

        Returns:
            Size and digest of the file.

        Raises:
            UnavailableError: If the size of the stored object differs from that of the file.
        """
        entry = describe_file(path)
        extra_args: dict[str, Any] = {"Metadata": {DIGEST_METADATA: entry.sha256}}
        if self.server.uses_checksums:
            extra_args["ChecksumAlgorithm"] = "SHA256"
        with self.translate_errors(key), self._transfer_manager() as transfers:
            callbacks = self._progress_callbacks("upload")
            transfers.upload(str(path), self._bucket, self._key_prefix + key, extra_args, callbacks).result()
        if (stored := self.size(key)) != entry.size:
            raise UnavailableError(
                f"{self.uri_of(key)} has {stored} bytes after the upload of {path} with {entry.size} bytes: "
                "the file changed during the upload, or another process wrote to the key. Try again."
            )
        return entry

    def download(self, key: str, path: Path, expected: FileEntry | None = None) -> FileEntry:
        """Download an object to a file, which appears only when it is complete.

        Args:
            key: Key of the object.
            path: Local file. Its directory is created, and an existing file is replaced.
            expected: Expected size and digest. After a mismatch, the object is downloaded once more.

        Returns:
            Size and digest of the file.

        Raises:
            DataError: If the object does not exist.
            DamagedError: If the content does not match `expected`.
            UnavailableError: If storage can't be reached, or the disk is full.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = partial_path(path)
        try:
            # A full disk must not look like a damaged object: callers handle the two differently.
            with report_full_disk(path.parent):
                entry = self._download(key, part, expected)
            if expected and entry != expected:
                self._counter.count_storage_retry()
                entry = self._download(key, part, expected)
            if expected and entry != expected:
                raise DamagedError(
                    f"{self.uri_of(key)} does not match its manifest: expected {expected.size} bytes with SHA-256 "
                    f"{expected.sha256}, got {entry.size} bytes with {entry.sha256}. The object was damaged or "
                    "replaced: try again, and if the error persists, delete the object and its manifest."
                )
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return entry

    def _download(self, key: str, part: Path, expected: FileEntry | None) -> FileEntry:
        if expected and expected.size <= self._settings.part_bytes:
            return self._download_in_one_request(key, part)
        with self.translate_errors(key), part.open("wb") as file, self._transfer_manager() as transfers:
            callbacks = self._progress_callbacks("download")
            transfers.download(self._bucket, self._key_prefix + key, file, None, callbacks).result()
        return describe_file(part)

    def _download_in_one_request(self, key: str, part: Path) -> FileEntry:
        """Compute the digest while the object arrives: for small files, everything but the request takes time."""
        with self.translate_errors(key):
            entry = self._get(key, partial(write_chunks, part))
        self._counter.count_storage_bytes("download", entry.size)
        return entry

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects. Keys that do not exist are ignored.

        Uses the form of deletion that the server supports, down to one request per object. If some objects can't be
        deleted, the others are deleted nevertheless.

        Args:
            keys: Keys of the objects.

        Raises:
            UnavailableError: If an object can't be deleted; see `topwork.clients.s3.errors` for the other errors.
        """
        remaining = iter(keys)
        failures: dict[str, boto.ClientError] = {}
        while batch := [self._key_prefix + key for key in islice(remaining, MAX_BATCH)]:
            with self.translate_errors():
                failures |= self.server.deletion.delete(self._bucket, batch)
        for key, error in failures.items():
            more = f" (and {len(failures) - 1} other objects)" if len(failures) > 1 else ""
            raise error_from_response(error, self.server.endpoint, self._bucket, f"s3://{self._bucket}/{key}{more}")

    @property
    def multipart_uploads(self) -> MultipartUploads:
        """Incomplete multipart uploads below `uri`."""
        return MultipartUploads(self._client, self._bucket, self._key_prefix, self.translate_errors)

    def target(self, key: str) -> dict[str, str]:
        """Return the bucket and the complete key, as parameters of a request."""
        return {"Bucket": self._bucket, "Key": self._key_prefix + key}

    @property
    def _client(self) -> Any:
        return self.server.client

    @contextmanager
    def translate_errors(self, key: str = "") -> Iterator[None]:
        """Translate botocore exceptions of the block into errors of topwork; see `topwork.clients.s3.errors`.

        Args:
            key: Key that the block works on; empty for `uri`.
        """
        with translate_errors(self.server.endpoint, self._bucket, self.uri_of(key) if key else self.uri):
            try:
                yield
            except boto.ClientError as error:
                if error.operation_name == "HeadObject" and http_status(error) in {400, 403}:
                    # The response to a HEAD request has no body: another request gets the error code.
                    self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._key_prefix + key, MaxKeys=1)
                raise

    def _transfer_manager(self) -> Any:
        config = TransferConfig(
            multipart_threshold=self._settings.part_bytes,
            multipart_chunksize=self._settings.part_bytes,
            max_concurrency=CONCURRENT_PARTS,
            # The CRT client, which boto3 selects on some machines, ignores the event handlers of `connect`.
            preferred_transfer_client="classic",
        )
        return create_transfer_manager(self._client, config)

    def _progress_callbacks(self, direction: str) -> Any:
        return [ProgressCallbackInvoker(lambda count: self._counter.count_storage_bytes(direction, count))]


def _parse_uri(uri: str) -> tuple[str, str]:
    """Split a storage URI into bucket and key prefix."""
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
        raise SettingError(f"{uri!r} is not a storage URI: expected s3://bucket or s3://bucket/prefix.")
    prefix = parts.path.strip("/")
    return parts.netloc, f"{prefix}/" if prefix else ""
