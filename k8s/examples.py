"""k8s/examples: each example as Kubernetes objects, as printed by `topwork render`."""

from collections.abc import Iterator
from pathlib import Path

from objects import NAMESPACE, kustomization, to_yaml

from topwork.cluster.manifests.render import RenderOptions, render
from topwork.spec.loading.loader import read_jobs

SPECS = Path(__file__).parent.parent / "examples"

EXAMPLE_COMMENT = """
Kubernetes objects of examples/{file}, which describes the expected results, for clusters without the
controller. With it, apply examples/{file}. Requires k8s/base and the Secret described there.

  kubectl apply -f k8s/examples/{file}
  topwork status {name} --namespace {namespace} --follow

The image is {image}. To use an image in a registry:

  topwork render examples/{file} --namespace {namespace} --image REGISTRY/{image} | kubectl apply -f -
"""
KUSTOMIZATION_COMMENT = """
All examples as Jobs, for clusters without the controller, and as a base for the overlays. To run one example without an
overlay:

  kubectl apply -f k8s/examples/NAME.yaml
"""


def files() -> Iterator[tuple[str, str]]:
    """Yield the name and the content of each file."""
    specs = sorted(SPECS.glob("*.yaml"))
    for path in specs:
        jobs = read_jobs(path)
        rendered = [render(job, RenderOptions(namespace=NAMESPACE)) for job in jobs]
        (container,) = rendered[0].training["spec"]["template"]["spec"]["containers"]
        comment = EXAMPLE_COMMENT.format(
            file=path.name, name=jobs[0].metadata.name, namespace=NAMESPACE, image=container["image"]
        )
        yield path.name, to_yaml(comment, *(manifest for run in rendered for manifest in run.objects))
    yield "kustomization.yaml", to_yaml(KUSTOMIZATION_COMMENT, kustomization(*(path.name for path in specs)))
