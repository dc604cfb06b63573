"""k8s/controller: the CustomResourceDefinitions and the controller of one namespace."""

from collections.abc import Iterator

from chart_objects import chart_objects
from objects import NAMESPACE, kustomization, to_yaml

from topwork import __version__
from topwork.cluster.definition import definition_text

CRD_FILE = "crd.yaml"
# In the order in which they are applied.
COMMENTS = {
    "service-account.yaml": "The service account of the controller.",
    "role.yaml": "Permissions of the controller in the namespace of the TransferJobs. It cannot read Secrets.",
    "role-binding.yaml": "Grants the permissions to the service account.",
    "lease-role.yaml": "Permissions for the Lease of the active controller.",
    "lease-role-binding.yaml": "Grants the permissions to the service account.",
    "deployment.yaml": "The controller. Change its image with images: in a kustomization.",
}
KUSTOMIZATION_COMMENT = f"""
The kinds TransferJob and TransferSearch with their controller, for the namespace {NAMESPACE} of k8s/base. kubectl
accepts one -k at a time:

  kubectl apply -k k8s/base
  kubectl apply --server-side -k k8s/controller
  kubectl apply -f examples/NAME.yaml -n {NAMESPACE}

The objects are those of the Helm chart with its default values. Use the chart for the webhook, for a controller of
several or all namespaces, and for monitoring. To use an image in a registry, apply a kustomization of your own:

  resources: [PATH/k8s/controller]
  images: [{{name: topwork, newName: REGISTRY/topwork, newTag: {__version__}-controller}}]

kubectl delete -k k8s/controller also deletes the definitions, and with them all TransferJobs and TransferSearches of
the cluster.
"""


def files() -> Iterator[tuple[str, str]]:
    """Yield the name and the content of each file."""
    objects = chart_objects("controller")
    yield CRD_FILE, definition_text()
    for name, comment in COMMENTS.items():
        yield name, to_yaml(comment, objects.pop(name))
    if objects:
        raise KeyError(f"COMMENTS has no entry for {', '.join(objects)}, which the chart renders.")
    yield "kustomization.yaml", to_yaml(KUSTOMIZATION_COMMENT, kustomization(CRD_FILE, *COMMENTS))
