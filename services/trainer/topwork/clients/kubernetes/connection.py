"""Connections to an API server, from a kubeconfig or the service account of a pod."""

import ipaddress
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3
from kubernetes.client import ApiClient, Configuration
from kubernetes.config import ConfigException
from kubernetes.config.incluster_config import InClusterConfigLoader

from topwork import __version__
from topwork.clients.kubernetes.kubeconfig import resolve_context
from topwork.errors import SettingError

DEFAULT_KUBECONFIG = "~/.kube/config"
# At least the number of threads that share a client: urllib3 warns when it closes a connection beyond this number.
MAX_IDLE_CONNECTIONS = 32
POD_IDENTITY = "the pod's service account"


@dataclass(frozen=True)
class ClusterSettings:
    """Selects a cluster, and sets timeouts and retries.

    Attributes:
        namespace: Namespace; None for that of the context or pod, or `default`.
        context: Context of the kubeconfig; None for the current one.
        kubeconfig: File, which must exist; None for `default_kubeconfig`.
        timeout_seconds: Timeout for a connection, and for the next bytes of a response.
        attempts: Maximum number of requests per call, with growing delays between them.
        backoff_seconds: Delay before the first retry.
        stream_seconds: A stream that sent nothing for this long is reopened, in case its connection is dead.
        log_outage_seconds: How long following a log may stay interrupted, such as during an API server upgrade.
        service_account_directory: Directory of the pod's service account.
        default_kubeconfig: Files, separated like $KUBECONFIG; None for ~/.kube/config.
        in_pod: Whether the service account of the pod may be used if no kubeconfig exists.
    """

    namespace: str | None = None
    context: str | None = None
    kubeconfig: str | None = None
    timeout_seconds: float = 30.0
    attempts: int = 5
    backoff_seconds: float = 0.5
    stream_seconds: float = 60.0
    log_outage_seconds: float = 300.0
    service_account_directory: str = "/var/run/secrets/kubernetes.io/serviceaccount"
    default_kubeconfig: str | None = None
    in_pod: bool = False


@dataclass(frozen=True)
class HttpAccess:
    """What another HTTP client needs to send requests to the API server.

    Attributes:
        server: URL of the API server.
        ssl_context: TLS context with the trusted authorities and the client certificate.
        proxy: URL of the proxy; None for direct connections.
        server_name: Name in the server's certificate; None for that of the URL.
    """

    server: str
    ssl_context: ssl.SSLContext
    proxy: str | None
    server_name: str | None


@dataclass(frozen=True)
class Connection:
    """An authenticated client of an API server.

    Attributes:
        client: Client of the official library.
        namespace: Default namespace.
        identity: Source of the credentials, for messages: `context NAME` or `the pod's service account`.
    """

    client: ApiClient
    namespace: str
    identity: str

    @property
    def server(self) -> str:
        """URL of the API server."""
        return str(self.client.configuration.host)

    @property
    def credentials(self) -> tuple[Any, ...]:
        """The credentials, to detect whether they changed. Never print them."""
        configuration = self.client.configuration
        return configuration.api_key.get("BearerToken"), configuration.cert_file, configuration.key_file

    @property
    def headers(self) -> dict[str, str]:
        """Headers of each request, with the current token. Never print them."""
        token = self.client.configuration.get_api_key_with_prefix("BearerToken")
        return dict(self.client.default_headers) | ({"Authorization": str(token)} if token else {})

    def open_access(self) -> HttpAccess:
        """Load the certificates for another HTTP client.

        Raises:
            SettingError: If a certificate can't be loaded.
        """
        configuration = self.client.configuration
        context = _create_ssl_context(configuration)
        if not configuration.verify_ssl:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        try:
            if configuration.ssl_ca_cert:
                context.load_verify_locations(configuration.ssl_ca_cert)
            if configuration.cert_file:
                context.load_cert_chain(configuration.cert_file, configuration.key_file)
        except OSError as error:
            raise SettingError(f"The certificates of {self.identity} can't be loaded: {error}.") from error
        return HttpAccess(self.server, context, configuration.proxy, configuration.tls_server_name)


def open_connection(settings: ClusterSettings) -> Connection:
    """Read the configuration and log in; sends no request to the API server.

    Raises:
        SettingError: If there is no configuration, or it can't be used.
    """
    if files := _kubeconfig_files(settings):
        return _connect_with_kubeconfig(files, settings)
    if settings.in_pod and not settings.context:
        return _connect_from_pod(settings)
    searched = settings.default_kubeconfig or DEFAULT_KUBECONFIG
    raise SettingError(
        f"No kubeconfig found: {searched} does not exist, and this process does not run in a pod. "
        "Set --kubeconfig or KUBECONFIG, and test the file with: kubectl cluster-info"
    )


def _kubeconfig_files(settings: ClusterSettings) -> list[Path]:
    """Return the existing kubeconfig files; a file set with --kubeconfig must exist."""
    if settings.kubeconfig:
        file = Path(settings.kubeconfig).expanduser()
        if not file.is_file():
            raise SettingError(f"{file} does not exist. Set --kubeconfig to a kubeconfig file.")
        return [file]
    paths = settings.default_kubeconfig or DEFAULT_KUBECONFIG
    files = [Path(path).expanduser() for path in paths.split(os.pathsep) if path]
    return [file for file in files if file.is_file()]


def _connect_with_kubeconfig(files: list[Path], settings: ClusterSettings) -> Connection:
    resolved = resolve_context(files, settings.context)
    configuration = _default_configuration()
    resolved.load(configuration)
    if resolved.cluster.content.get("proxy-url"):
        configuration.no_proxy = None  # as in kubectl, proxy-url overrides no_proxy
    elif _is_loopback(configuration.host):
        configuration.proxy = None
    if configuration.host.startswith("http:") and not _is_loopback(configuration.host):
        # As in kubectl, credentials are never sent over a network without TLS.
        configuration.api_key.clear()
        configuration.refresh_api_key_hook = None
    client = _create_client(configuration)
    if resolved.user and (impersonated := resolved.user.content.get("as")):
        client.set_default_header("Impersonate-User", impersonated)
    namespace = settings.namespace or resolved.context.content.get("namespace") or "default"
    return Connection(client, namespace, f"context {resolved.context.name}")


def _connect_from_pod(settings: ClusterSettings) -> Connection:
    directory = Path(settings.service_account_directory)
    configuration = _default_configuration()
    loader = InClusterConfigLoader(str(directory / "token"), str(directory / "ca.crt"))
    try:
        loader.load_and_set(configuration)
    except (ConfigException, OSError) as error:
        raise SettingError(
            f"The pod has no usable service account in {directory} ({str(error).rstrip('.')}). Set "
            "automountServiceAccountToken: true and a service account in the pod, or set --kubeconfig."
        ) from error
    file = directory / "namespace"
    namespace = settings.namespace or (file.read_text().strip() if file.is_file() else "") or "default"
    return Connection(_create_client(configuration), namespace, POD_IDENTITY)


def _default_configuration() -> Configuration:
    # RestClient retries: retries in urllib3 would multiply its attempts and ignore the error type.
    configuration = Configuration(retries=False)
    configuration.keep_alive = True
    configuration.connection_pool_maxsize = MAX_IDLE_CONNECTIONS
    return configuration


def _create_client(configuration: Configuration) -> ApiClient:
    if not configuration.verify_ssl:  # the kubeconfig disables verification: do not warn on each request
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    client = ApiClient(configuration)
    client.rest_client.pool_manager.connection_pool_kw["ssl_context"] = _create_ssl_context(configuration)
    client.user_agent = f"topwork/{__version__}"
    return client


def _create_ssl_context(configuration: Configuration) -> ssl.SSLContext:
    """Create a TLS context that verifies certificates like kubectl.

    Since version 3.13, Python rejects certificate authorities without key identifiers, which the clusters of some
    providers use (kubernetes-client/python#2394).
    """
    requirement = ssl.CERT_REQUIRED if configuration.verify_ssl else ssl.CERT_NONE
    context = urllib3.util.ssl_.create_urllib3_context(cert_reqs=requirement)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if not configuration.ssl_ca_cert:
        context.load_default_certs()
    return context


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
