"""Objects of the Helm chart as plain manifests, so that the chart and k8s/ cannot differ."""

from functools import cache
from pathlib import PurePath

import helm_python
import yaml
from objects import NAMESPACE

from topwork.clients.kubernetes import KubernetesObject

CHART = PurePath(__file__).parent.parent / "charts" / "topwork"
HELM_LABELS = ("app.kubernetes.io/managed-by", "helm.sh/chart")


def chart_objects(directory: str) -> dict[str, KubernetesObject]:
    """Render the chart with its default values.

    Args:
        directory: Templates to return, as a path in `templates/`; subdirectories are not included.

    Returns:
        The object of each template that renders one, by the name of the template, without the labels of Helm.
    """
    return {
        path.name: _without_helm_labels(yaml.safe_load(text))
        for path, text in _rendered().items()
        if path.parent == PurePath("topwork/templates", directory) and path.suffix == ".yaml" and text.strip()
    }


@cache
def _rendered() -> dict[PurePath, str]:
    with helm_python.Chart.load(CHART) as chart:
        templates = chart.render({}, name="topwork", namespace=NAMESPACE)
    return {PurePath(path): text for path, text in templates.items()}


def _without_helm_labels(obj: KubernetesObject) -> KubernetesObject:
    metadata = [obj["metadata"], obj.get("spec", {}).get("template", {}).get("metadata", {})]
    for labels in (item.get("labels", {}) for item in metadata):
        for name in HELM_LABELS:
            labels.pop(name, None)
    return obj
