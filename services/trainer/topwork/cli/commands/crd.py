"""`topwork crd`: print or apply the CustomResourceDefinition of TransferJobs."""

import sys
from typing import Annotated

import typer

from topwork.cli.options import Context, Kubeconfig, open_cluster


def crd(
    apply: Annotated[
        bool, typer.Option("--apply", help="Create or update the definition in the cluster instead of printing it.")
    ] = False,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print the CustomResourceDefinition of TransferJobs, as input for kubectl.

    Updating the definition keeps all TransferJobs. Requires Kubernetes 1.31 or newer, and the permission to create and
    patch customresourcedefinitions.
    """
    from topwork.cluster.definition import definition, definition_text

    if not apply:
        sys.stdout.write(definition_text())
        return
    cluster = open_cluster(None, context, kubeconfig)
    applied = cluster.apply(definition(), force=True)
    print(f"customresourcedefinition/{applied['metadata']['name']} applied")
