"""`topwork controller`: run TransferJobs of a cluster as Jobs, and keep their status up to date."""

import os
import re
import signal
import socket
import sys
import threading
import uuid
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import structlog
import typer

from topwork.cli.options import Context, Kubeconfig
from topwork.cli.runtime.environment import default_kubeconfig, is_in_pod
from topwork.cli.runtime.logging import LogFormat, configure_logging
from topwork.errors import SettingError
from topwork.spec.kubernetes_types import NAMESPACE

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster
    from topwork.cluster.controller.runtime.certificates import Certificates
    from topwork.cluster.controller.runtime.webhook import WebhookServer
    from topwork.spec.loading.defaults import SpecDefaults

log = structlog.get_logger(__name__)

REQUIRED_MODULES = ("kopf", "cryptography", "optuna")
# Elections and admission requests can't wait for the usual retries.
QUICK_SECONDS, WEBHOOK_SECONDS = 5.0, 2.0
FILE_CHECK_SECONDS, AUTHORITY_CHECK_SECONDS = 10.0, 300.0


def controller(
    namespaces: Annotated[
        list[str] | None,
        typer.Option("--namespace", "-n", help="Namespace of TransferJobs; repeatable [default: that of the pod]."),
    ] = None,
    all_namespaces: Annotated[
        bool, typer.Option("--all-namespaces", help="Serve the TransferJobs of all namespaces.")
    ] = False,
    lease_namespace: Annotated[
        str | None, typer.Option(help="Namespace of the Lease [default: that of the pod].", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of TransferJobs reconciled at the same time.")] = 4,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of /metrics, /healthz and /readyz.")] = 8080,
    webhook_port: Annotated[int, typer.Option(min=0, max=65535, help="HTTPS port of the webhook.")] = 9443,
    webhook_certificates: Annotated[
        Path | None,
        typer.Option(help="Serve the webhook with tls.crt and tls.key of this directory; renewed files are reloaded."),
    ] = None,
    webhook_self_signed: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIGURATION",
            help="Serve the webhook with a self-signed certificate, and add its authority to this "
            "ValidatingWebhookConfiguration.",
        ),
    ] = None,
    webhook_host: Annotated[
        str | None, typer.Option(help="Host name of the webhook, for --webhook-self-signed: NAME.NAMESPACE.svc.")
    ] = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Run the TransferJobs of a cluster as Jobs, and its TransferSearches, and keep their status up to date.

    Runs until SIGTERM. Of several replicas, the one that holds the Lease works. Exit codes: 0 after SIGTERM; 1 the
    Lease was lost; 2 an option or the configuration of the connection is invalid.
    """
    configure_logging(LogFormat.json)
    require_modules()
    if all_namespaces and namespaces:
        raise SettingError("--namespace and --all-namespaces exclude each other. Remove one of them.")
    for name in namespaces or ():
        if not re.fullmatch(NAMESPACE, name):
            raise SettingError(f"--namespace {name} is not the name of a namespace. Repeat the option for several.")
    file = str(kubeconfig) if kubeconfig else None
    stop = _stop_event()
    cluster = _connect(file, context)
    quick = _connect(file, context, seconds=QUICK_SECONDS, attempts=1)
    webhook = None
    if certificates := _certificates(cluster, webhook_certificates, webhook_self_signed, webhook_host):
        defaults = _connect(file, context, seconds=WEBHOOK_SECONDS, attempts=1)
        seconds = FILE_CHECK_SECONDS if webhook_certificates else AUTHORITY_CHECK_SECONDS
        webhook = _webhook(webhook_port, certificates, defaults, seconds)

    from topwork.cluster.controller.dispatch import Dispatcher
    from topwork.cluster.controller.reconciler import ReconcilerSettings
    from topwork.cluster.controller.runtime.leader_election import LeaderElection
    from topwork.cluster.controller.runtime.process import ControllerProcess, ProcessSettings

    election = LeaderElection(quick.in_namespace(lease_namespace or cluster.namespace), _identity())
    scopes = () if all_namespaces else tuple(dict.fromkeys(namespaces or [cluster.namespace]))
    settings = ProcessSettings(scopes, workers, http_port)
    dispatcher = Dispatcher(cluster, ReconcilerSettings())
    _exit(ControllerProcess(cluster, dispatcher, election, webhook, settings).run(stop))


def require_modules() -> None:
    """Check that the requirements of the controller are installed.

    Raises:
        SettingError: If one is missing.
    """
    for module in REQUIRED_MODULES:
        if find_spec(module) is None:
            raise SettingError(
                f"{module} is not installed, and topwork controller needs it. Install it with: "
                "pip install 'topwork[controller]'"
            )


def _connect(kubeconfig: str | None, context: str | None, *, seconds: float = 30.0, attempts: int = 5) -> "Cluster":
    from topwork.clients.kubernetes.cluster import ClusterSettings, connect

    return connect(
        ClusterSettings(
            context=context,
            kubeconfig=kubeconfig,
            timeout_seconds=seconds,
            attempts=attempts,
            default_kubeconfig=default_kubeconfig(),
            in_pod=is_in_pod(),
        )
    )


def _certificates(
    cluster: "Cluster", directory: Path | None, configuration: str | None, host: str | None
) -> "Certificates | None":
    """Return the certificates of the webhook; None if it is not enabled."""
    if directory and configuration:
        raise SettingError("--webhook-certificates and --webhook-self-signed exclude each other. Remove one of them.")
    if not configuration and not directory:
        return None
    from topwork.cluster.controller.runtime.certificates import FileCertificates, SelfSignedCertificates

    if directory:
        return FileCertificates(directory)
    if not host:
        raise SettingError(
            "--webhook-self-signed needs --webhook-host: the host name of the webhook's Service, such as "
            "topwork-controller.team-a.svc."
        )
    return SelfSignedCertificates(cluster, str(configuration), host)


def _webhook(port: int, certificates: "Certificates", cluster: "Cluster", seconds: float) -> "WebhookServer":
    from topwork.cluster.controller.runtime.webhook import WebhookServer
    from topwork.cluster.manifests.defaults import read_defaults

    def read(namespace: str) -> "SpecDefaults | None":
        defaults = read_defaults(cluster.in_namespace(namespace))
        return defaults.spec if defaults else None

    return WebhookServer(port, certificates, read, seconds)


def _identity() -> str:
    """Return the name of this process in the Lease: in a pod, a restarted container continues without waiting."""
    return socket.gethostname() if is_in_pod() else f"{socket.gethostname()}_{uuid.uuid4()}"


def _stop_event() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _exit(code: int) -> None:
    """End the process immediately: threads may be waiting for responses, which an ordinary exit would wait for."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
