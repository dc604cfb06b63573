"""Options that several commands share: cluster, namespace, image, overrides, state directory, metrics and output."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.runtime.environment import default_kubeconfig, is_in_pod
from topwork.cli.runtime.logging import LogFormat
from topwork.cluster.names import RunKind
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster
    from topwork.clients.prometheus.metrics import Metrics

Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", help="Namespace [default: that of the context].", show_default=False),
]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig [default: the current one].")]
Kubeconfig = Annotated[
    Path | None,
    typer.Option(help="kubeconfig file [default: $KUBECONFIG, ~/.kube/config, or the pod's service account]."),
]
Image = Annotated[
    str | None,
    typer.Option(envvar="TOPWORK_IMAGE", help="Image of all containers [default: the image that make image builds]."),
]
As = Annotated[
    RunKind | None,
    typer.Option(
        "--as",
        help="Use only plain Jobs, or only TransferJobs [default: TransferJobs where the cluster serves them].",
        show_default=False,
    ),
]
State = Annotated[
    Path | None,
    typer.Option(help="Directory for scratch and the embedded S3 server [default: ~/.local/state/topwork]."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Set a value in all specs, such as spec.transfer.epochs=2; repeatable. VALUE is YAML; null removes the "
        "key. List items are addressed by index: spec.evaluate.gates.0.atLeast=0.9.",
        show_default=False,
    ),
]
Replicas = Annotated[
    int | None,
    typer.Option(min=1, max=64, help="Train this many replicas on the CPU [default: all GPUs, or one CPU device]."),
]
MetricsPort = Annotated[int | None, typer.Option(min=0, max=65535, help="Serve Prometheus metrics on this port.")]
LogFormatOption = Annotated[LogFormat, typer.Option(help="Format of log lines when standard error is not a terminal.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the final lines.")]


def format_overrides(overrides: Iterable[str]) -> list[str]:
    """Format overrides as shell-quoted `--set` options, for a command line that is shown to the user."""
    return [f"--set {shlex.quote(override)}" for override in overrides]


def open_cluster(namespace: str | None, context: str | None, kubeconfig: Path | None) -> "Cluster":
    """Connect to the cluster that the options select, as kubectl does.

    Raises:
        SettingError: If there is no configuration or no such context, or if it can't be used.
    """
    from topwork.clients.kubernetes.cluster import ClusterSettings, connect

    return connect(
        ClusterSettings(
            namespace,
            context,
            str(kubeconfig) if kubeconfig else None,
            default_kubeconfig=default_kubeconfig(),
            in_pod=is_in_pod(),
        )
    )


def serve_metrics(metrics: "Metrics", port: int) -> int:
    """Serve metrics on the port of `--metrics-port`.

    Args:
        metrics: The metrics of the process.
        port: TCP port; 0 selects a free port.

    Returns:
        The port.

    Raises:
        SettingError: If the port is in use or not permitted.
    """
    try:
        return metrics.serve(port)
    except OSError as error:
        raise SettingError(
            f"Cannot listen on --metrics-port {port} ({error.strerror}). Choose another port, or 0 for a free one."
        ) from error
