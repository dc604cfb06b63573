"""The chart as Helm renders it."""

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
def rendered(chart: helm_python.Chart) -> Callable[..., dict[tuple[str, str], dict[str, Any]]]:
    """Render values, as the release topwork in the namespace ml; gives the objects by kind and name."""

    def render(values: dict[str, Any], **options: Any) -> dict[tuple[str, str], dict[str, Any]]:
        texts = chart.render(values, **({"name": "topwork", "namespace": NAMESPACE} | options))
        found = [
            manifest
            for path, text in texts.items()
            if not path.endswith("NOTES.txt")
            for manifest in yaml.safe_load_all(text)
            if manifest
        ]
        objects = {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in found}
        assert len(objects) == len(found), "two objects of one name"
        return objects

    return render
