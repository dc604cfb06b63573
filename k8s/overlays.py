"""k8s/overlays: the examples without GPUs, with two GPUs, or in a Kueue queue."""

from collections.abc import Iterator

from objects import LABELS, NAMESPACE, TEMPLATE_SUFFIX, kustomization, metadata, to_yaml

from topwork import __version__
from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import GPU_RESOURCE, QUEUE_LABEL, ROLE_LABEL
from topwork.spec.yaml_output import dump_yaml

EXAMPLES = "../../examples"
QUEUE = "topwork"
QUEUES_FILE = f"queues{TEMPLATE_SUFFIX}"
KUEUE = "kueue.x-k8s.io/v1beta2"

GPUS_COMMENT = """
spec.compute.gpus in job.yaml of the ConfigMap does not change: stages use the GPUs that they find. Alternatively, set
gpus: {gpus} in the spec and render it again, which also validates the rest of the spec against this number.

The patch lists the unchanged container pull to keep the order: kustomize moves patched containers to the front.
"""
CPU_COMMENT = f"""
The examples without GPUs: they train on CPUs, with the CPU image.
{GPUS_COMMENT.format(gpus=0)}"""
TWO_GPUS_COMMENT = f"""
The examples with two GPUs each, which share the global batch.
{GPUS_COMMENT.format(gpus=2)}"""
KUEUE_COMMENT = f"""
The examples in the Kueue queue {QUEUE}. Kueue suspends each Job until enough quota is available. Jobs only need the
label with the name of the queue. {QUEUES_FILE} shows how to create the queue.

Alternatively, set compute.queue: {QUEUE} in the spec and render it again.
"""
USAGE_COMMENT = """
To apply all examples, or only one:

  kubectl apply -k k8s/overlays/{name}
  kubectl kustomize k8s/overlays/{name} | kubectl apply -l topwork.dev/job=NAME -f -
"""
QUEUES_COMMENT = f"""
A queue for the namespace {NAMESPACE}, to be created by a cluster administrator. This is an example, which is not
applied with this directory. Change the quotas, which must cover every resource that the pods request, and run

  kubectl apply -f k8s/overlays/kueue/{QUEUES_FILE}

Requires Kueue 0.15 or later. Earlier versions use the API version v1beta1.
"""


def files() -> Iterator[tuple[str, str]]:
    """Yield the name and the content of each file."""
    overlays = {
        "cpu": (CPU_COMMENT, image_tag("cpu") | {"patches": [gpu_patch(None)]}),
        "two-gpus": (TWO_GPUS_COMMENT, image_tag("gpu") | {"patches": [gpu_patch(2)]}),
        "kueue": (KUEUE_COMMENT, {"patches": [queue_patch()]}),
    }
    for name, (comment, fields) in overlays.items():
        yield (
            f"{name}/kustomization.yaml",
            to_yaml(comment + USAGE_COMMENT.format(name=name), kustomization(EXAMPLES, **fields)),
        )
    yield f"kueue/{QUEUES_FILE}", to_yaml(QUEUES_COMMENT, *queues())


def image_tag(accelerator: str) -> KubernetesObject:
    """Build the field that selects the image for an accelerator."""
    return {"images": [{"name": "topwork", "newTag": f"{__version__}-{accelerator}"}]}


def gpu_patch(count: int | None) -> KubernetesObject:
    """Build a patch that sets the GPUs of the training containers; None removes them."""
    resources = {"requests": {GPU_RESOURCE: count}, "limits": {GPU_RESOURCE: count}}
    pod = {
        # Without pull, kustomize would move transfer before it (kubernetes-sigs/kustomize#3912, #5904).
        "initContainers": [{"name": "pull"}, {"name": "transfer", "resources": resources}],
        "containers": [{"name": "fine-tune", "resources": resources}],
    }
    target = {"kind": "Job", "labelSelector": f"{ROLE_LABEL}=training"}
    return {"target": target, "patch": dump_yaml([job_patch({}, spec={"template": {"spec": pod}})])}


def queue_patch() -> KubernetesObject:
    """Build a patch that adds the queue label to all Jobs."""
    return {"target": {"kind": "Job"}, "patch": dump_yaml([job_patch({"labels": {QUEUE_LABEL: QUEUE}})])}


def job_patch(metadata: KubernetesObject, **fields: KubernetesObject) -> KubernetesObject:
    """Build a strategic merge patch for Jobs; kustomize requires a name, but uses the target to select them."""
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "any", **metadata}, **fields}


def queues() -> list[KubernetesObject]:
    """Build the objects of a queue: a resource flavor, a cluster queue with quotas, and a local queue."""
    quantities = {"cpu": 32, "memory": "128Gi", "ephemeral-storage": "500Gi", GPU_RESOURCE: 4}
    quotas = [{"name": resource, "nominalQuota": quantity} for resource, quantity in quantities.items()]
    cluster_metadata = {"name": QUEUE, "labels": dict(LABELS)}
    spec = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}},
        "resourceGroups": [{"coveredResources": list(quantities), "flavors": [{"name": QUEUE, "resources": quotas}]}],
    }
    return [
        {"apiVersion": KUEUE, "kind": "ResourceFlavor", "metadata": cluster_metadata},
        {"apiVersion": KUEUE, "kind": "ClusterQueue", "metadata": cluster_metadata, "spec": spec},
        {"apiVersion": KUEUE, "kind": "LocalQueue", "metadata": metadata(QUEUE), "spec": {"clusterQueue": QUEUE}},
    ]
