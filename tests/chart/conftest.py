"""Fixtures that render the Helm chart."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

CHART = Path(__file__).parents[2] / "charts" / "topwork"
NAMESPACE = "ml"


@pytest.fixture(scope="session")
def chart() -> Iterator[helm_python.Chart]:
    with helm_python.Chart.load(CHART) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def render_chart(chart: helm_python.Chart) -> Callable[..., dict[tuple[str, str], dict[str, Any]]]:
    """Render values as the release topwork in the namespace ml; returns objects by kind and name."""

    def render(values: dict[str, Any], **options: Any) -> dict[tuple[str, str], dict[str, Any]]:
        templates = chart.render(values, **({"name": "topwork", "namespace": NAMESPACE} | options))
        manifests = [
            manifest
            for path, text in templates.items()
            if not path.endswith("NOTES.txt")
            for manifest in yaml.safe_load_all(text)
            if manifest
        ]
        objects = {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}
        assert len(objects) == len(manifests), "two objects have the same kind and name"
        return objects

    return render
