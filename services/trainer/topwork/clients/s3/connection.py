"""The connection to an S3 server: where it is, whose keys, how patient; the other half of `edge.storage`."""

import ipaddress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore import exceptions as boto
from botocore.config import Config
from botocore.credentials import RefreshableCredentials
from botocore.loaders import create_loader

from topwork.clients.s3.errors import DAMAGED, code_of, told
from topwork.clients.s3.stall_detection import Watch
from topwork.clients.url_policy import check_plain_http
from topwork.errors import SettingError
from topwork.redaction import hide

CONNECTIONS = 64
# Pause before what arrived damaged is sent again, times the attempts so far.
AGAIN_SECONDS = 0.2


@dataclass(frozen=True)
class StorageSettings:
    """Where storage is and how to speak to it; None leaves it to the AWS variables, profiles and web identity.

    Attributes:
        endpoint_url: URL of the server.
        access_key: Access key id.
        secret_key: Secret access key.
        region: Region that requests are signed for.
        ca_bundle: PEM file with the authorities that are trusted.
        path_style: Bucket in the path of the URL instead of the host name; None: with any endpoint but Amazon's.
        attempts: Requests at most for one call, with growing pauses between them.
        connect_timeout_seconds: Wait for a connection.
        read_timeout_seconds: Wait for the next bytes of an answer, and for the next piece of its body.
        part_bytes: Size from which files are sent in parts, and size of the parts; at least 5 MiB.
    """

    endpoint_url: str | None = None
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    region: str | None = None
    ca_bundle: str | None = None
    path_style: bool | None = None
    attempts: int = 6
    connect_timeout_seconds: float = 10.0
    read_timeout_seconds: float = 60.0
    part_bytes: int = 16 << 20


FROM_ENVIRONMENT = StorageSettings()


class Meter(Protocol):
    """Counts what moves; `topwork.clients.prometheus.metrics.Metrics` is one."""

    def storage_bytes(self, direction: str, count: int) -> None:
        """Count bytes moved; `direction` is upload or download."""

    def storage_retry(self) -> None:
        """Count one request that was tried again."""


class Unmetered:
    """Counts nothing."""

    def storage_bytes(self, direction: str, count: int) -> None:
        """Count nothing."""

    def storage_retry(self) -> None:
        """Count nothing."""


def connect(settings: StorageSettings, meter: Meter) -> Any:
    """Make a client of botocore.

    Args:
        settings: Server and credentials.
        meter: Counts the requests that are tried again.

    Raises:
        SettingError: If the profile is not there, the endpoint is no URL or a half of the credentials is missing, or
            if it is plain HTTP on the open network.
    """
    path_style = settings.path_style
    if path_style is None and settings.endpoint_url:
        path_style = not _is_amazon(settings.endpoint_url)
    try:
        with told(settings.endpoint_url or "the endpoint of S3", bucket="", target="storage"):
            client = _client(settings, path_style)
            # An endpoint from the AWS variables or files is known only now; what those say about the style holds.
            styled = "addressing_style" in (client.meta.config.s3 or {})
            if not styled and not _is_amazon(client.meta.endpoint_url):
                client = _client(settings, path_style=True)
    except boto.ProfileNotFound as error:
        raise SettingError(f"AWS_PROFILE names a profile that is not there: {error}.") from error
    except ValueError as error:
        raise SettingError(f"The endpoint of storage is not a URL: {error}. Look at AWS_ENDPOINT_URL.") from error

    check_plain_http(str(client.meta.endpoint_url), "The endpoint of storage (AWS_ENDPOINT_URL)")

    def count(attempts: int, response: Any, **_: object) -> float | None:
        # Asked after each attempt: from the second on, one more was a retry.
        if attempts > 1:
            meter.storage_retry()
        code = response[1].get("Error", {}).get("Code") if response else None
        # botocore itself sends nothing again that was damaged on its way.
        return AGAIN_SECONDS * attempts if code in DAMAGED and attempts < settings.attempts else None

    client.meta.events.register("needs-retry.s3", count)
    # botocore has no other way to its connections.
    client.meta.events.register(
        "before-send.s3", Watch(client._endpoint.http_session, settings.read_timeout_seconds).send
    )
    return client


def _client(settings: StorageSettings, path_style: bool | None) -> Any:
    session = boto3.session.Session(region_name=settings.region, botocore_session=_session())
    endpoint = settings.endpoint_url
    config = Config(
        retries={"mode": "standard", "total_max_attempts": settings.attempts},
        connect_timeout=settings.connect_timeout_seconds,
        read_timeout=settings.read_timeout_seconds,
        max_pool_connections=CONNECTIONS,
        # A proxy is never the way to a server on this machine.
        proxies={} if endpoint and _is_loopback(endpoint) else None,
        s3=None if path_style is None else {"addressing_style": "path" if path_style else "virtual"},
    )
    if settings.access_key is None:
        _keep_secret(session.get_credentials())
    return session.client(
        "s3",
        # Servers of one's own take any region; it only has to be one for the signature.
        region_name=session.region_name or "us-east-1",
        endpoint_url=endpoint,
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key,
        verify=settings.ca_bundle,
        config=config,
    )


def _keep_secret(credentials: Any) -> None:
    """Let what stands in a file of AWS be said as little as what stands in the environment.

    Credentials that a role gives are of hours, and asking for them here would be a request of its own.
    """
    if credentials is not None and not isinstance(credentials, RefreshableCredentials):
        hide([value for value in (credentials.secret_key, credentials.token) if value], "storage credentials")


def _session() -> Any:
    session = botocore.session.get_session()
    session.register_component("data_loader", _descriptions())
    return session


@cache
def _descriptions() -> Any:
    """Keep the description of S3 once it is parsed: that takes most of the time that a client takes to make."""
    return create_loader()


def _is_amazon(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws"))


def _is_loopback(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_bucket(settings: StorageSettings, bucket: str) -> None:
    """Make a bucket of the embedded server; one that is there already stays as it is.

    Args:
        settings: Server and credentials.
        bucket: Name of the bucket: 3 to 63 lower-case letters, digits, dots and hyphens.

    Raises:
        SettingError: If the server refuses the name or the credentials.
        UnavailableError: If the server can't be reached.
    """
    client = connect(settings, Unmetered())
    with told(str(client.meta.endpoint_url), bucket, f"s3://{bucket}"):
        try:
            client.create_bucket(Bucket=bucket)
        except boto.ClientError as error:
            if code_of(error) not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                raise
