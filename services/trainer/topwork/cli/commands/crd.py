"""`topwork crd`: print or apply the CustomResourceDefinitions of TransferJobs and TransferSearches."""

import sys
from typing import Annotated

import typer

from topwork.cli.options import Context, Kubeconfig, open_cluster


def crd(
    apply: Annotated[
        bool, typer.Option("--apply", help="Create or update the definitions in the cluster instead of printing them.")
    ] = False,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print the CustomResourceDefinitions of TransferJobs and TransferSearches, as input for kubectl.

    Updating the definitions keeps all objects. Requires Kubernetes 1.31 or newer, and the permission to create and
    patch customresourcedefinitions.
    """
    from topwork.cluster.definition import CUSTOM_RESOURCES, definition, definition_text

    if not apply:
        sys.stdout.write(definition_text())
        return
    cluster = open_cluster(None, context, kubeconfig)
    for resource in CUSTOM_RESOURCES:
        applied = cluster.apply(definition(resource), force=True)
        print(f"customresourcedefinition/{applied['metadata']['name']} applied")
