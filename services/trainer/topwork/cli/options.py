"""Options that say which cluster, namespace and image is meant, as kubectl has them."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace [default: that of the context].", show_default=False)
]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig [default: the current one].")]
Kubeconfig = Annotated[
    Path | None, typer.Option(help="kubeconfig file [default: $KUBECONFIG, ~/.kube/config, or the pod's own account].")
]

Image = Annotated[
    str | None,
    typer.Option(envvar="TOPWORK_IMAGE", help="Image of all containers [default: the one that make image builds]."),
]


def open_cluster(namespace: str | None, context: str | None, kubeconfig: Path | None) -> "Cluster":
    """Connect to the cluster that the options name, as kubectl would.

    Raises:
        SettingError: If there is no configuration, no such context, or it can't be used.
    """
    from topwork.clients.kubernetes.cluster import ClusterSettings, connect

    return connect(ClusterSettings(namespace, context, str(kubeconfig) if kubeconfig else None))


Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Set a value in all specs, such as spec.transfer.epochs=2; several allowed. VALUE is YAML, null takes the "
        "key out, and list items go by number: spec.evaluate.gates.0.atLeast=0.9.",
        show_default=False,
    ),
]


def as_options(overrides: Iterable[str]) -> list[str]:
    """Write overrides as a shell takes them, for a command that is shown."""
    return [f"--set {shlex.quote(override)}" for override in overrides]
