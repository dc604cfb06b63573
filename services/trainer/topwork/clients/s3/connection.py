"""Connection settings for S3, and creation of the boto3 client: endpoint, credentials, timeouts and retries."""

import ipaddress
import random
import socket
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore import exceptions as boto
from botocore.config import Config
from botocore.httpsession import URLLib3Session
from botocore.loaders import create_loader
from botocore.utils import get_environ_proxies

from topwork.clients.s3.credentials import ReloadableCredentials, ReloadableProvider, retry_delay
from topwork.clients.s3.errors import DAMAGED_REQUEST_CODES, error_code, is_temporary_status, translate_errors
from topwork.clients.s3.stall_detection import StallDetector
from topwork.clients.url_policy import check_plain_http
from topwork.errors import SettingError
from topwork.redaction import register_secrets

MAX_CONNECTIONS = 64
# Delay before a damaged request is repeated, multiplied by the number of attempts so far.
DAMAGED_RETRY_SECONDS = 0.2
MAX_RETRY_SECONDS = 20.0
# botocore uses this variable for TLS after AWS_CA_BUNDLE, but does not name it in its configuration.
EXTRA_SESSION_VARIABLES = {"requests_ca_bundle": (None, "REQUESTS_CA_BUNDLE", None, None)}


@dataclass(frozen=True)
class StorageSettings:
    """Address, credentials and timeouts of an S3 server. Fields that are None use the AWS variables, files and roles.

    Attributes:
        endpoint_url: URL of the server.
        access_key: Access key ID.
        secret_key: Secret access key.
        region: Region in the request signature.
        ca_bundle: PEM file with the trusted certificate authorities.
        path_style: Whether the bucket is part of the URL path instead of the host name. None selects path style for all
            endpoints except Amazon's.
        attempts: Maximum number of requests for one call, with exponential backoff.
        connect_timeout_seconds: Timeout for a connection.
        read_timeout_seconds: Timeout for the next bytes of a response, and for the next chunk of its body.
        part_bytes: Part size of multipart uploads, and the minimum size of files uploaded in parts; at least 5 MiB.
        uses_checksums: Whether requests contain checksums besides their signature. None uses
            AWS_REQUEST_CHECKSUM_CALCULATION, which users set for servers that do not support them.
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
    uses_checksums: bool | None = None


class TransferCounter(Protocol):
    """Counts transferred bytes and retries; implemented by `topwork.clients.prometheus.metrics.Metrics`."""

    def count_storage_bytes(self, direction: str, count: int) -> None:
        """Count transferred bytes; `direction` is upload or download."""

    def count_storage_retry(self) -> None:
        """Count one retried request."""


class NullTransferCounter:
    """A counter that ignores everything."""

    def count_storage_bytes(self, direction: str, count: int) -> None:
        """Ignore transferred bytes."""

    def count_storage_retry(self) -> None:
        """Ignore a retry."""


def connect(settings: StorageSettings, counter: TransferCounter) -> Any:
    """Create an S3 client.

    Args:
        settings: Address, credentials and timeouts.
        counter: Counts retried requests.

    Returns:
        The boto3 client.

    Raises:
        SettingError: If the AWS profile does not exist, the endpoint is not a URL or uses plain HTTP on a public
            network, or the credentials are incomplete.
    """
    path_style = settings.path_style
    if path_style is None and settings.endpoint_url:
        path_style = not _is_amazon(settings.endpoint_url)
    try:
        with translate_errors(settings.endpoint_url or "the S3 endpoint", bucket="", target="storage"):
            botocore_session = _create_botocore_session()
            provider = ReloadableProvider(botocore_session, _create_botocore_session)
            botocore_session.register_component("credential_provider", provider)
            session = boto3.session.Session(region_name=settings.region, botocore_session=botocore_session)
            client = _create_client(session, settings, path_style)
            # The client has read the endpoint from AWS variables or files. An addressing style set there has priority.
            has_style = "addressing_style" in (client.meta.config.s3 or {})
            if not has_style and not _is_amazon(client.meta.endpoint_url):
                client = _create_client(session, settings, path_style=True)
    except boto.ProfileNotFound as error:
        raise SettingError(f"AWS_PROFILE names a profile that does not exist: {error}.") from error
    except ValueError as error:
        raise SettingError(f"The storage endpoint is not a URL: {error}. Check AWS_ENDPOINT_URL.") from error

    check_plain_http(str(client.meta.endpoint_url), "The storage endpoint (AWS_ENDPOINT_URL)")
    credentials = None if settings.access_key else session.get_credentials()
    _retry_rejected_requests(client, settings, counter, credentials)
    http_session = _create_http_session(botocore_session, client, settings)
    detector = StallDetector(http_session, settings.read_timeout_seconds)
    client.meta.events.register("before-send.s3", detector.send)
    return client


def _create_botocore_session() -> Any:
    session = botocore.session.get_session(EXTRA_SESSION_VARIABLES)
    session.register_component("data_loader", _service_model_loader())
    return session


@cache
def _service_model_loader() -> Any:
    """Cache the parsed S3 service model: parsing takes most of the time of creating a client."""
    return create_loader()


def _create_client(session: Any, settings: StorageSettings, path_style: bool | None) -> Any:
    endpoint = settings.endpoint_url
    checksums = None
    if settings.uses_checksums is not None:
        checksums = "when_supported" if settings.uses_checksums else "when_required"
    config = Config(
        retries={"mode": "standard", "total_max_attempts": settings.attempts},
        connect_timeout=settings.connect_timeout_seconds,
        read_timeout=settings.read_timeout_seconds,
        max_pool_connections=MAX_CONNECTIONS,
        # A server on this machine is never behind a proxy.
        proxies={} if endpoint and _is_loopback(endpoint) else None,
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
        s3=None if path_style is None else {"addressing_style": "path" if path_style else "virtual"},
    )
    if settings.access_key is None:
        _redact_credentials(session.get_credentials())
    return session.client(
        "s3",
        # Most S3 servers accept any region, but the signature requires one.
        region_name=session.region_name or "us-east-1",
        endpoint_url=endpoint,
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key,
        verify=settings.ca_bundle,
        config=config,
    )


def _redact_credentials(credentials: ReloadableCredentials | None) -> None:
    """Redact credentials from AWS files in all output, like those from environment variables.

    Credentials of a role are not redacted: they expire within hours, and reading them would require a request.
    """
    if credentials is not None and not credentials.is_temporary:
        register_secrets(
            [value for value in (credentials.secret_key, credentials.token) if value], "storage credentials"
        )


def _retry_rejected_requests(
    client: Any, settings: StorageSettings, counter: TransferCounter, credentials: ReloadableCredentials | None
) -> None:
    """Retry requests that botocore does not retry, and count all retries.

    These are requests that were damaged in transit, that failed with an unusual status of a proxy (such as 522), or
    whose credentials have been replaced in the meantime.
    """

    def on_attempt(attempts: int, response: Any, **_: object) -> float | None:
        # Called after each attempt: the second and later ones were retries.
        if attempts > 1:
            counter.count_storage_retry()
        if response is None or attempts >= settings.attempts:
            return None
        status, code = response[0].status_code, response[1].get("Error", {}).get("Code", "")
        if code in DAMAGED_REQUEST_CODES:
            return DAMAGED_RETRY_SECONDS * attempts
        if is_temporary_status(status):
            return random.uniform(0, min(MAX_RETRY_SECONDS, 2 ** (attempts - 1)))  # noqa: S311 - not a secret
        return retry_delay(credentials, attempts, status, code)

    client.meta.events.register("needs-retry.s3", on_attempt)


def _create_http_session(botocore_session: Any, client: Any, settings: StorageSettings) -> URLLib3Session:
    """Create the HTTP session that sends the requests of a client, configured like the client's own.

    botocore gives no public access to the session of a client, which the stall detection needs to see the responses
    while they arrive.
    """
    config = client.meta.config
    variable = botocore_session.get_config_variable
    socket_options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
    if variable("tcp_keepalive"):
        socket_options.append((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1))
    return URLLib3Session(
        verify=settings.ca_bundle or variable("ca_bundle") or variable("requests_ca_bundle") or True,
        proxies=get_environ_proxies(client.meta.endpoint_url) if config.proxies is None else config.proxies,
        timeout=(config.connect_timeout, config.read_timeout),
        max_pool_connections=config.max_pool_connections,
        socket_options=socket_options,
        client_cert=config.client_cert,
        proxies_config=config.proxies_config,
    )


def _is_amazon(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws"))


def _is_loopback(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def create_bucket(settings: StorageSettings, bucket: str) -> None:
    """Create a bucket; an existing one is left unchanged.

    Args:
        settings: Address and credentials of the server.
        bucket: Name of the bucket: 3 to 63 lowercase letters, digits, dots and hyphens.

    Raises:
        SettingError: If the server rejects the name or the credentials.
        UnavailableError: If the server can't be reached.
    """
    client = connect(settings, NullTransferCounter())
    with translate_errors(str(client.meta.endpoint_url), bucket, f"s3://{bucket}"):
        try:
            client.create_bucket(Bucket=bucket)
        except boto.ClientError as error:
            if error_code(error) not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                raise
