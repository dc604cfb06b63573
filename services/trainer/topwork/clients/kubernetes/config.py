"""Which cluster, whose login, which namespace: kubeconfig files and service accounts, as kubectl reads them."""

import ipaddress
import logging
import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3
from kubernetes.client import ApiClient, Configuration
from kubernetes.config import ConfigException, load_kube_config_from_dict
from kubernetes.config.incluster_config import InClusterConfigLoader
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from topwork import __version__
from topwork.errors import SettingError

DEFAULT_FILE = "~/.kube/config"
LOG_IN = "Log in again as you do for kubectl."
POD_ACCOUNT = "the pod's service account"


@dataclass(frozen=True)
class ClusterSettings:
    """Which cluster is meant, and how patient to be with it.

    Attributes:
        namespace: Namespace; None: that of the context, or of the pod, or `default`.
        context: Context of the kubeconfig; None: the current one.
        kubeconfig: File; None: the files of $KUBECONFIG, ~/.kube/config, or the pod's own service account.
        timeout_seconds: Wait for a connection, and for the next bytes of an answer.
        attempts: Requests at most for one call, with growing pauses between them.
        pause_seconds: The first pause.
        stream_seconds: Silence after which a stream is taken up again, so that a dead connection is noticed.
        patience_seconds: How long a log that is followed may stay broken off, such as while an API server is upgraded.
        service_account: Folder with the service account of the pod.
    """

    namespace: str | None = None
    context: str | None = None
    kubeconfig: str | None = None
    timeout_seconds: float = 30.0
    attempts: int = 5
    pause_seconds: float = 0.5
    stream_seconds: float = 60.0
    patience_seconds: float = 300.0
    service_account: str = "/var/run/secrets/kubernetes.io/serviceaccount"


@dataclass(frozen=True)
class Connection:
    """A client that is ready, and where it leads.

    Attributes:
        client: Client of the official library.
        namespace: Namespace.
        login: Whose login it is, for messages: `context NAME`, or the pod's.
    """

    client: ApiClient
    namespace: str
    login: str

    @property
    def server(self) -> str:
        """URL of the API server."""
        return str(self.client.configuration.host)

    @property
    def credentials(self) -> tuple[Any, ...]:
        """What the server knows the user by; to compare, never to print."""
        stated = self.client.configuration
        return stated.api_key.get("BearerToken"), stated.cert_file, stated.key_file


def open_connection(settings: ClusterSettings) -> Connection:
    """Find the configuration and log in.

    Raises:
        SettingError: If there is none, or it can't be used.
    """
    files = _files(settings)
    if files:
        return _from_files(files, settings)
    if os.environ.get("KUBERNETES_SERVICE_HOST") and not settings.context:
        return _from_pod(settings)
    looked = os.environ.get("KUBECONFIG") or DEFAULT_FILE
    raise SettingError(
        f"There is no kubeconfig: looked for {looked}, and this is no pod of a cluster. "
        "Name the file with --kubeconfig or KUBECONFIG; kubectl cluster-info shows whether it is good."
    )


def _files(settings: ClusterSettings) -> list[Path]:
    """Files that are there; one that the user names must be."""
    if settings.kubeconfig:
        named = Path(settings.kubeconfig).expanduser()
        if not named.is_file():
            raise SettingError(f"{named} does not exist. Name a kubeconfig file with --kubeconfig.")
        return [named]
    stated = os.environ.get("KUBECONFIG") or DEFAULT_FILE
    files = [Path(each).expanduser() for each in stated.split(os.pathsep) if each]
    return [file for file in files if file.is_file()]


# ── kubeconfig files ────────────────────────────────────────────────────────────────────────────────────────────────


def _from_files(files: list[Path], settings: ClusterSettings) -> Connection:
    merged = merge(files)
    where = ", ".join(map(str, files))
    name = settings.context or merged["current-context"]
    context = named(merged, "contexts", name, f"the context {name}", where)["context"]
    cluster = named(merged, "clusters", context.get("cluster"), f"the cluster of the context {name}", where)["cluster"]
    user: dict[str, Any] = {}
    if context.get("user"):
        user = named(merged, "users", context["user"], f"the user of the context {name}", where)["user"] or {}
    if user.get("as-groups") or user.get("as-user-extra"):
        raise SettingError(f"{where}: the user {context['user']} impersonates groups (as-groups); only `as` is known.")
    configuration = _configuration()
    hint = (user.get("exec") or {}).get("installHint") or ""
    with _usable(where, name), renewing(f"{where}: the login of the context {name}", hint):
        load_kube_config_from_dict(merged, name, configuration, persist_config=False)
    if not configuration.host:
        raise SettingError(f"{where}: the cluster {context['cluster']} has no server. Expected its URL.")
    if cluster.get("proxy-url"):
        configuration.no_proxy = None  # kubectl takes a proxy of the file for every address
    elif _is_loopback(configuration.host):
        configuration.proxy = None
    if configuration.host.startswith("http:") and not _is_loopback(configuration.host):  # in the clear, for all to see
        configuration.api_key.clear()
        configuration.refresh_api_key_hook = None
    client = _client(configuration)
    if user.get("as"):
        client.set_default_header("Impersonate-User", user["as"])
    return Connection(client, settings.namespace or context.get("namespace") or "default", f"the context {name}")


# ── The pod's own account ───────────────────────────────────────────────────────────────────────────────────────────


def _from_pod(settings: ClusterSettings) -> Connection:
    folder = Path(settings.service_account)
    configuration = _configuration()
    try:
        InClusterConfigLoader(str(folder / "token"), str(folder / "ca.crt")).load_and_set(configuration)
    except (ConfigException, OSError) as error:
        raise SettingError(
            f"This pod has no token for the API server ({error} {folder}). Give it a service account with "
            "automountServiceAccountToken: true, or name a kubeconfig with --kubeconfig."
        ) from error
    own = folder / "namespace"
    namespace = settings.namespace or (own.read_text().strip() if own.is_file() else "") or "default"
    return Connection(_client(configuration), namespace, POD_ACCOUNT)


# ── The client ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _configuration() -> Configuration:
    # Retries are ours: those of urllib3 would multiply them, and know no Retry-After of Kubernetes.
    configuration = Configuration(retries=False)
    configuration.keep_alive = True
    return configuration


def _client(configuration: Configuration) -> ApiClient:
    if not configuration.verify_ssl:  # the kubeconfig says so: not again on every request
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    client = ApiClient(configuration)
    client.rest_client.pool_manager.connection_pool_kw["ssl_context"] = _tls(configuration)
    client.user_agent = f"topwork/{__version__}"
    return client


def _tls(configuration: Configuration) -> ssl.SSLContext:
    """Check certificates as kubectl does.

    From 3.13 on, Python refuses authorities without key identifiers, which is what the clusters of some providers have
    (kubernetes-client/python#2394).
    """
    needed = ssl.CERT_REQUIRED if configuration.verify_ssl else ssl.CERT_NONE
    context = urllib3.util.ssl_.create_urllib3_context(cert_reqs=needed)
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


@contextmanager
def _usable(where: str, context: str) -> Iterator[None]:
    """Turn what the client finds wrong with a kubeconfig into a sentence."""
    try:
        yield
    except (ConfigException, ValueError, KeyError, TypeError, OSError) as error:
        raise SettingError(f"{where} can't be used: context {context}: {_one_line(error)}.") from error


@contextmanager
def renewing(login: str, hint: str = "") -> Iterator[None]:
    """Notice that a plugin did not give a login: the client only logs that, and goes on without one.

    Args:
        login: Whose login it is, for the message.
        hint: How the plugin is installed, as the kubeconfig says.

    Raises:
        SettingError: If it did not.
    """
    failures = _Failures()
    root = logging.getLogger()
    root.addHandler(failures)
    try:
        yield
    finally:
        root.removeHandler(failures)
    if failures.said:
        raise SettingError(f"{login} failed: {failures.said}. {_one_line(hint) or LOG_IN}")


class _Failures(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said = ""
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "root" and record.thread == self._thread:
            self.said = _one_line(record.getMessage()).rstrip(".")


def _one_line(said: object) -> str:
    return " ".join(str(said).split())


# Keys of a kubeconfig that hold a path, which is relative to the file that it stands in.
PATHS = ("certificate-authority", "client-certificate", "client-key", "tokenFile")


def merge(files: list[Path]) -> dict[str, Any]:
    """Read kubeconfig files and merge them: of a name, and of current-context, the first file that has one counts.

    Args:
        files: Files that are there.

    Returns:
        One kubeconfig, with absolute paths.

    Raises:
        SettingError: If one of them is none.
    """
    merged: dict[str, Any] = {"apiVersion": "v1", "kind": "Config", "current-context": ""}
    lists: dict[str, dict[str, Any]] = {"clusters": {}, "contexts": {}, "users": {}}
    for file in files:
        content = _read(file)
        merged["current-context"] = merged["current-context"] or content.get("current-context") or ""
        for kind, entries in lists.items():
            for entry in content.get(kind) or []:
                if not isinstance(entry, dict) or not entry.get("name"):
                    raise SettingError(f"{file} is no kubeconfig: an entry of {kind} has no name.")
                entries.setdefault(entry["name"], entry | {kind[:-1]: _absolute(entry.get(kind[:-1]) or {}, file)})
    return merged | {kind: list(entries.values()) for kind, entries in lists.items()}


def _read(file: Path) -> dict[str, Any]:
    try:
        content = YAML(typ="safe").load(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{file} can't be read: {error}") from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise SettingError(f"{file} is no kubeconfig: {where}{getattr(error, 'problem', error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingError(f"{file} is no kubeconfig: expected a mapping with clusters, contexts and users.")
    return content


def _absolute(content: dict[str, Any], file: Path) -> dict[str, Any]:
    folder = file.absolute().parent
    found = content | {key: str(folder / content[key]) for key in PATHS if content.get(key)}
    command = (content.get("exec") or {}).get("command") or ""
    if "/" in command:  # a bare name is looked up in PATH
        found["exec"] = content["exec"] | {"command": str(folder / command)}
    if found.get("tokenFile"):  # the client would send the newline at its end, too
        try:
            found["token"] = Path(found.pop("tokenFile")).read_text().strip()
        except OSError as error:
            raise SettingError(f"{file}: tokenFile can't be read: {error}") from error
    return found


def named(merged: dict[str, Any], kind: str, name: str | None, what: str, where: str) -> dict[str, Any]:
    """Find an entry of a kubeconfig.

    Args:
        merged: The kubeconfig.
        kind: clusters, contexts or users.
        name: Name of the entry; None or empty is no context at all.
        what: What the entry is, for the message.
        where: Files, for the message.

    Raises:
        SettingError: If there is none of that name.
    """
    names = [entry["name"] for entry in merged[kind]]
    if not name:
        raise SettingError(
            f"{where} names no current context. Choose one with --context or kubectl config use-context: "
            f"{', '.join(names) or 'there is none'}."
        )
    for entry in merged[kind]:
        if entry["name"] == name:
            return dict(entry)
    raise SettingError(f"{where} has not {what}: {name!r} is none of its {kind} ({', '.join(names) or 'it has none'}).")
