"""k8s/examples: each example as the objects that `topwork render` prints."""

from collections.abc import Iterator
from pathlib import Path

from manifests import NAMESPACE, kustomization, text

from topwork.cluster.manifests.render import RenderOptions, render
from topwork.spec.loading.loader import read_jobs

SPECS = Path(__file__).parent.parent / "examples"

EXAMPLE_WORDS = """
examples/{file} as Kubernetes takes it; the head of that file says what to expect. It needs k8s/base and
the Secret that is described there.

  kubectl apply -f k8s/examples/{file}
  topwork status {name} --namespace {namespace} --follow

The containers run {image}. Where the nodes get it from a registry:

  topwork render examples/{file} --namespace {namespace} --image REGISTRY/{image} | kubectl apply -f -
"""
ALL_WORDS = """
All examples, for the overlays. To run one of them as it is: kubectl apply -f k8s/examples/NAME.yaml
"""


def files() -> Iterator[tuple[str, str]]:
    """Give each file with its text."""
    specs = sorted(SPECS.glob("*.yaml"))
    for path in specs:
        jobs = read_jobs(path)
        rendered = [render(job, RenderOptions(namespace=NAMESPACE)) for job in jobs]
        (container,) = rendered[0].training["spec"]["template"]["spec"]["containers"]
        words = EXAMPLE_WORDS.format(
            file=path.name, name=jobs[0].metadata.name, namespace=NAMESPACE, image=container["image"]
        )
        yield path.name, text(words, *(one for each in rendered for one in each.objects))
    yield "kustomization.yaml", text(ALL_WORDS, kustomization(*(path.name for path in specs)))
