"""Options that say which cluster, namespace and image is meant, as kubectl has them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from topwork.edge.kubernetes import Cluster

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
    from topwork.edge.kubernetes import ClusterSettings, connect

    return connect(ClusterSettings(namespace, context, str(kubeconfig) if kubeconfig else None))
