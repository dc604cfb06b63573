"""Object storage that the pods and this machine both reach: one's own, or the embedded server behind a forwarder."""

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

# What is handed to the pods; a bundle of certificates is a path on this machine and stays here.
HANDED_ON = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
OWN_BUCKET = "topwork-cluster-test"


@dataclass(frozen=True)
class ClusterStorage:
    """Where the jobs of the tests keep everything.

    Attributes:
        bucket: A bucket that is there.
        settings: How this machine reaches it.
        variables: What the pods find in their environment, from the Secret topwork-s3.
    """

    bucket: str
    settings: StorageSettings
    variables: Mapping[str, str]

    def at(self, prefix: str) -> Storage:
        """The storage below a prefix."""
        return self.open(f"s3://{self.bucket}/{prefix}")

    def open(self, address: str) -> Storage:
        """The storage at an address, as a spec names it."""
        return Storage(address, self.settings)

    @property
    def here(self) -> dict[str, str]:
        """Variables with which a command on this machine reaches the storage."""
        trusted = {name: os.environ[name] for name in ("AWS_CA_BUNDLE",) if name in os.environ}
        return {**trusted, **self.variables}

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that a pod must reach."""
        region = self.variables.get("AWS_REGION") or self.variables.get("AWS_DEFAULT_REGION") or "us-east-1"
        url = self.variables.get("AWS_ENDPOINT_URL_S3") or self.variables.get("AWS_ENDPOINT_URL")
        parts = urlsplit(url or f"https://s3.{region}.amazonaws.com")
        return parts.hostname or "", parts.port or {"http": 80}.get(parts.scheme, 443)


def own_storage(bucket: str, environment: Mapping[str, str] = os.environ) -> ClusterStorage:
    """The storage that the AWS variables and TOPWORK_TEST_BUCKET name."""
    variables = {name: environment[name] for name in HANDED_ON if environment.get(name)}
    if missing := {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} - variables.keys():
        pytest.fail(f"TOPWORK_TEST_BUCKET is set, but {' and '.join(sorted(missing))} not: the pods need both.")
    return ClusterStorage(bucket, StorageSettings(), variables)


@contextmanager
def served_storage(state: Path, host: str) -> Iterator[ClusterStorage]:
    """Start an S3 server with random credentials, and let pods reach it at an address of this machine."""
    with embedded_storage(state) as inner, forwarded(host, urlsplit(inner.endpoint_url or "").port or 0) as port:
        endpoint = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        settings = StorageSettings(
            endpoint_url=endpoint, access_key=inner.access_key, secret_key=inner.secret_key, region=inner.region
        )
        create_bucket(settings, OWN_BUCKET)
        variables = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": inner.access_key or "",
            "AWS_SECRET_ACCESS_KEY": inner.secret_key or "",
            "AWS_REGION": inner.region or "",
        }
        yield ClusterStorage(OWN_BUCKET, settings, variables)


@contextmanager
def forwarded(host: str, target: int) -> Iterator[int]:
    """Pass connections to a free port of an address on to a port of the loopback interface.

    The S3 server itself stays on loopback with all its inner ports.
    """
    with _listen(host) as listener:
        threading.Thread(target=_accept, args=(listener, target), daemon=True).start()
        yield int(listener.getsockname()[1])
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for the next connection


def _listen(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, 0), family=family, backlog=128)
    except OSError:
        # An address by which others see this machine, and that none of its interfaces has.
        return socket.create_server(("", 0), backlog=128)


def _accept(listener: socket.socket, target: int) -> None:
    while True:
        try:
            caller, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_join, args=(caller, target), daemon=True).start()


def _join(caller: socket.socket, target: int) -> None:
    with caller, suppress(OSError), socket.create_connection(("127.0.0.1", target)) as server:
        there = threading.Thread(target=_pass, args=(caller, server), daemon=True)
        there.start()
        _pass(server, caller)
        there.join()


def _pass(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
