"""k8s/overlays: the examples as other clusters want them."""

from collections.abc import Iterator

from manifests import LABELS, NAMESPACE, TEMPLATE, Manifest, kustomization, metadata, text

from topwork import __version__
from topwork.cluster.names import GPU_RESOURCE, QUEUE_LABEL, ROLE_LABEL
from topwork.spec.yaml_output import dump_yaml

EXAMPLES = "../../examples"
QUEUE = "topwork"
QUEUES_FILE = f"queues{TEMPLATE}"
KUEUE = "kueue.x-k8s.io/v1beta2"

COUNTED_WORDS = """
job.yaml in the ConfigMap keeps its spec.compute.gpus: the stages count the GPUs that they have. The other way is to
change the spec to gpus: {gpus} and to render that, which also checks that the rest of the spec goes with it.

The patch names pull, which it doesn't change, for its place: kustomize moves the containers of a patch to the front.
"""
CPU_WORDS = f"""
The examples without GPUs: they train on the processor, from the image for that.
{COUNTED_WORDS.format(gpus=0)}"""
TWO_GPUS_WORDS = f"""
The examples with two GPUs each, between which the global batch is divided.
{COUNTED_WORDS.format(gpus=2)}"""
KUEUE_WORDS = f"""
The examples in the queue {QUEUE} of Kueue, which holds each Job back until there is quota for it. It suspends Jobs and
lets them go by itself: they only name their queue. {QUEUES_FILE} shows how to make it.

The other way is to change the spec to queue: {QUEUE} and to render that.
"""
USE_WORDS = """
All of them, or one:

  kubectl apply -k k8s/overlays/{name}
  kubectl kustomize k8s/overlays/{name} | kubectl apply -l topwork.dev/job=NAME -f -
"""
QUEUES_WORDS = f"""
A queue for the namespace {NAMESPACE}, from whoever runs the cluster. An example, which nothing applies by itself.
Change the amounts, which must cover every resource that the pods ask for, and

  kubectl apply -f k8s/overlays/kueue/{QUEUES_FILE}

This is for Kueue 0.15 and later; before that, the API was v1beta1.
"""


def files() -> Iterator[tuple[str, str]]:
    """Give each file with its text."""
    changes = {
        "cpu": (CPU_WORDS, images("cpu") | {"patches": [gpus(None)]}),
        "two-gpus": (TWO_GPUS_WORDS, images("gpu") | {"patches": [gpus(2)]}),
        "kueue": (KUEUE_WORDS, {"patches": [queue()]}),
    }
    for name, (words, change) in changes.items():
        comment = words + USE_WORDS.format(name=name)
        yield f"{name}/kustomization.yaml", text(comment, kustomization(EXAMPLES, **change))
    yield f"kueue/{QUEUES_FILE}", text(QUEUES_WORDS, *queues())


def images(accelerator: str) -> Manifest:
    """Have all containers run the image for an accelerator."""
    return {"images": [{"name": "topwork", "newTag": f"{__version__}-{accelerator}"}]}


def gpus(count: int | None) -> Manifest:
    """Set the GPUs of the containers that train; None takes away what there is."""
    resources = {"requests": {GPU_RESOURCE: count}, "limits": {GPU_RESOURCE: count}}
    pod = {
        # Without pull, transfer would come before it (kubernetes-sigs/kustomize#3912, #5904).
        "initContainers": [{"name": "pull"}, {"name": "transfer", "resources": resources}],
        "containers": [{"name": "fine-tune", "resources": resources}],
    }
    target = {"kind": "Job", "labelSelector": f"{ROLE_LABEL}=training"}
    return {"target": target, "patch": dump_yaml([job_patch({}, spec={"template": {"spec": pod}})])}


def queue() -> Manifest:
    """Name the queue on every Job."""
    return {"target": {"kind": "Job"}, "patch": dump_yaml([job_patch({"labels": {QUEUE_LABEL: QUEUE}})])}


def job_patch(metadata: Manifest, **more: Manifest) -> Manifest:
    """Build a strategic merge patch of Jobs; kustomize wants a name in it, and goes by the target."""
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "any", **metadata}, **more}


def queues() -> list[Manifest]:
    """Build what Kueue needs: a flavour of nodes, its quota, and the way to it from the namespace."""
    amounts = {"cpu": 32, "memory": "128Gi", GPU_RESOURCE: 4}
    quotas = [{"name": resource, "nominalQuota": amount} for resource, amount in amounts.items()]
    everywhere = {"name": QUEUE, "labels": dict(LABELS)}
    spec = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}},
        "resourceGroups": [{"coveredResources": list(amounts), "flavors": [{"name": QUEUE, "resources": quotas}]}],
    }
    return [
        {"apiVersion": KUEUE, "kind": "ResourceFlavor", "metadata": everywhere},
        {"apiVersion": KUEUE, "kind": "ClusterQueue", "metadata": everywhere, "spec": spec},
        {"apiVersion": KUEUE, "kind": "LocalQueue", "metadata": metadata(QUEUE), "spec": {"clusterQueue": QUEUE}},
    ]
