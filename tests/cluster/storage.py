"""Object storage that pods and this machine can reach: a configured bucket, or the embedded server."""

import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from topwork.clients.s3.storage import Storage, StorageSettings, create_bucket
from topwork.local.server import embedded_storage

# Variables passed to the pods. AWS_CA_BUNDLE is not one of them, because it is a path on this machine.
POD_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
BUCKET = "topwork-cluster-test"


@dataclass(frozen=True)
class ClusterStorage:
    """Storage of the test jobs.

    Attributes:
        bucket: An existing bucket.
        settings: Connection settings for this machine.
        variables: Environment variables of the pods, from the Secret topwork-s3.
    """

    bucket: str
    settings: StorageSettings
    variables: Mapping[str, str]

    def at(self, prefix: str) -> Storage:
        """Open the storage below a prefix."""
        return self.open(f"s3://{self.bucket}/{prefix}")

    def open(self, address: str) -> Storage:
        """Open the storage at a URI, as in a spec."""
        return Storage(address, self.settings)

    @property
    def local_variables(self) -> dict[str, str]:
        """Environment variables for commands on this machine."""
        ca_bundle = {name: os.environ[name] for name in ("AWS_CA_BUNDLE",) if name in os.environ}
        return {**ca_bundle, **self.variables}

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that pods connect to."""
        region = self.variables.get("AWS_REGION") or self.variables.get("AWS_DEFAULT_REGION") or "us-east-1"
        url = self.variables.get("AWS_ENDPOINT_URL_S3") or self.variables.get("AWS_ENDPOINT_URL")
        parts = urlsplit(url or f"https://s3.{region}.amazonaws.com")
        return parts.hostname or "", parts.port or {"http": 80}.get(parts.scheme, 443)


def configured_storage(bucket: str, environment: Mapping[str, str] = os.environ) -> ClusterStorage:
    """Return the storage that the AWS variables and TOPWORK_TEST_BUCKET select."""
    variables = {name: environment[name] for name in POD_VARIABLES if environment.get(name)}
    if missing := {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} - variables.keys():
        pytest.fail(f"TOPWORK_TEST_BUCKET is set, but {' and '.join(sorted(missing))} is not: the pods need both.")
    return ClusterStorage(bucket, StorageSettings(), variables)


@contextmanager
def serve_storage(state: Path, host: str) -> Iterator[ClusterStorage]:
    """Run the embedded S3 server with random credentials, reachable at an address of this machine."""
    with embedded_storage(state) as local, forward_port(host, urlsplit(local.endpoint_url or "").port or 0) as port:
        endpoint = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        settings = StorageSettings(
            endpoint_url=endpoint, access_key=local.access_key, secret_key=local.secret_key, region=local.region
        )
        create_bucket(settings, BUCKET)
        variables = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": local.access_key or "",
            "AWS_SECRET_ACCESS_KEY": local.secret_key or "",
            "AWS_REGION": local.region or "",
        }
        yield ClusterStorage(BUCKET, settings, variables)


@contextmanager
def forward_port(host: str, target: int) -> Iterator[int]:
    """Forward connections from a free port of an address to a port of the loopback interface.

    The S3 server itself, including its internal ports, listens only on the loopback interface.
    """
    with _listen(host) as listener:
        threading.Thread(target=_accept, args=(listener, target), daemon=True).start()
        yield int(listener.getsockname()[1])
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # unblocks the thread that accepts connections


def _listen(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, 0), family=family, backlog=128)
    except OSError:
        # Behind NAT, no interface of this machine has the address.
        return socket.create_server(("", 0), backlog=128)


def _accept(listener: socket.socket, target: int) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_forward, args=(client, target), daemon=True).start()


def _forward(client: socket.socket, target: int) -> None:
    with client, suppress(OSError), socket.create_connection(("127.0.0.1", target)) as server:
        upload = threading.Thread(target=_copy, args=(client, server), daemon=True)
        upload.start()
        _copy(server, client)
        upload.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
