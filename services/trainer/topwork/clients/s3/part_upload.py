"""A multipart upload as a context manager: it is aborted unless it was completed."""

import base64
import hashlib
from types import TracebackType
from typing import IO, Any, Self

from botocore import exceptions as boto

from topwork.clients.s3.objects import READ_BYTES
from topwork.clients.s3.server import Server

Part = dict[str, str | int]


class PartUpload:
    """Uploads one object in parts. `upload` is thread-safe."""

    def __init__(self, server: Server, target: dict[str, str]) -> None:
        """Prepare the upload; the context starts it.

        Args:
            server: The server.
            target: Bucket and key.
        """
        self._server, self._target = server, target
        self._upload_id = ""
        self._is_complete = False

    def __enter__(self) -> Self:
        checksum = {"ChecksumAlgorithm": "SHA256"} if self._server.uses_checksums else {}
        response = self._server.client.create_multipart_upload(**self._target, **checksum)
        self._upload_id = str(response["UploadId"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._is_complete:
            try:
                self.abort()
            except (boto.BotoCoreError, boto.ClientError):
                return  # the start of a later run aborts it

    def upload(self, number: int, data: IO[bytes] | Any) -> Part:
        """Upload a part.

        Args:
            number: Number of the part, from 1.
            data: A file that can be read several times.

        Returns:
            The part, for `complete`.
        """
        checksum: Part = {}
        if self._server.uses_checksums:
            digest = hashlib.sha256()
            while block := data.read(READ_BYTES):
                digest.update(block)
            data.seek(0)
            checksum["ChecksumSHA256"] = base64.b64encode(digest.digest()).decode()
        request = {**self._target, "UploadId": self._upload_id, "PartNumber": number, "Body": data, **checksum}
        response = self._server.client.upload_part(**request)
        return {"PartNumber": number, "ETag": response["ETag"], **checksum}

    def complete(self, parts: list[Part]) -> None:
        """Create the object from its parts.

        Args:
            parts: Results of `upload`, in the order of their numbers.
        """
        self._server.client.complete_multipart_upload(
            **self._target, UploadId=self._upload_id, MultipartUpload={"Parts": parts}
        )
        self._is_complete = True

    def abort(self) -> None:
        """Abort the upload, which deletes its parts."""
        self._server.client.abort_multipart_upload(**self._target, UploadId=self._upload_id)
        self._is_complete = True
