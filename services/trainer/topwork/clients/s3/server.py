"""An S3 server as this process uses it: its client, and the forms of requests that it was found to support."""

from dataclasses import replace
from typing import Any

from topwork.clients.s3.connection import StorageSettings, TransferCounter, connect
from topwork.clients.s3.deletion import ObjectDeletion


class Server:
    """An S3 server. All `Storage` objects that share a connection share one instance. Thread-safe.

    Attributes:
        settings: Address, credentials and timeouts.
        counter: Counts bytes and retries.
        client: The boto3 client.
        deletion: Deletes objects in the form that the server supports.
    """

    def __init__(self, settings: StorageSettings, counter: TransferCounter) -> None:
        self.settings, self.counter = settings, counter
        self.client: Any = connect(settings, counter)
        self.deletion = ObjectDeletion(self.client)

    @property
    def endpoint(self) -> str:
        """URL of the server."""
        return str(self.client.meta.endpoint_url)

    @property
    def uses_checksums(self) -> bool:
        """Whether requests contain checksums."""
        # Users disable them (AWS_REQUEST_CHECKSUM_CALCULATION) for servers that do not support them.
        return bool(self.client.meta.config.request_checksum_calculation != "when_required")

    def without_checksums(self) -> Any:
        """Return a client that sends checksums only where S3 requires them."""
        return connect(replace(self.settings, uses_checksums=False), self.counter)

    def disable_checksums(self) -> None:
        """Stop sending checksums, because the server does not support them.

        Uploads still verify the size, and downloads the digest in the manifest.
        """
        self.client = self.without_checksums()
        self.deletion = ObjectDeletion(self.client)
