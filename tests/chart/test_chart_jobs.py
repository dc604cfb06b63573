"""The chart renders `jobs` as TransferJobs that contain exactly what the values contain."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import helm_python
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from object_validation import TRICKY_STRINGS

from topwork.spec.loading.loader import read_jobs

ROOT = Path(__file__).parents[2]
SPECS = [
    *sorted((ROOT / "examples").glob("*.yaml")),
    *sorted((ROOT / "tests" / "kubernetes" / "golden").glob("*/job.yaml")),
    ROOT / "tests" / "unit" / "valid_spec.yaml",
]
Render = Callable[..., dict[tuple[str, str], dict[str, Any]]]


def read_documents(path: Path) -> list[dict[str, Any]]:
    documents = [helm_python.values_from_yaml(text) for text in path.read_text(encoding="utf-8").split("\n---\n")]
    return [document for document in documents if document]


def transfer_jobs(objects: dict[tuple[str, str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: obj for (kind, name), obj in objects.items() if kind == "TransferJob"}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: str(path.relative_to(ROOT)))
def test_jobs_become_the_documents_that_kubectl_applies(path: Path, render_chart: Render) -> None:
    documents = read_documents(path)
    assert [document["metadata"]["name"] for document in documents] == [job.metadata.name for job in read_jobs(path)]
    entries = {
        document["metadata"]["name"]: {"spec": document["spec"]}
        | {key: document["metadata"][key] for key in ("labels", "annotations") if key in document["metadata"]}
        for document in documents
    }
    expected = {
        document["metadata"]["name"]: document | {"metadata": document["metadata"] | {"namespace": "ml"}}
        for document in documents
    }
    assert transfer_jobs(render_chart({"jobs": entries})) == expected


def test_labels_and_annotations_of_a_job_are_those_in_the_values(render_chart: Render) -> None:
    values = {"labels": {"team": "vision"}, "annotations": {"topwork.dev/cancel": "cats-0a1b2c3d"}, "spec": {"seed": 1}}
    # Labels of the chart would be labels of the pods: a new version of the chart would restart every run.
    assert transfer_jobs(render_chart({"jobs": {"cats": values}}))["cats"]["metadata"] == {
        "name": "cats",
        "namespace": "ml",
        "labels": {"team": "vision"},
        "annotations": {"topwork.dev/cancel": "cats-0a1b2c3d"},
    }


def test_unquoted_on_and_off_stay_the_booleans_that_helm_reads(render_chart: Render) -> None:
    spec = helm_python.values_from_yaml("transfer: {featureCache: off}\nfineTune: {epochs: 1, featureCache: on}")
    assert spec["transfer"] == {"featureCache": False}
    assert transfer_jobs(render_chart({"jobs": {"cats": {"spec": spec}}}))["cats"]["spec"] == spec


NUMBERS = st.integers(-(2**53), 2**53) | st.floats(-1e6, 1e6)
# YAML allows no control characters. Helm removes null from values.
CHARACTERS = st.characters(exclude_categories=("Cs", "Cc", "Cn")) | st.sampled_from("\n\t")
TEXT = st.text(CHARACTERS, max_size=20) | st.sampled_from([text for text in TRICKY_STRINGS if "\x07" not in text])
KEYS = st.text(CHARACTERS, min_size=1, max_size=8)
SCALARS = st.booleans() | NUMBERS | TEXT
CONTENT = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
)
# No shrinking: rendering takes at least 0.1 seconds.
PHASES = (Phase.explicit, Phase.generate)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=PHASES)
@given(st.dictionaries(KEYS, CONTENT, max_size=4))
def test_any_content_of_a_spec_is_unchanged(render_chart: Render, spec: dict[str, Any]) -> None:
    assert transfer_jobs(render_chart({"jobs": {"any": {"spec": spec}}}))["any"].get("spec") == (spec or {})


def test_jobs_without_the_controller_are_rejected(render_chart: Render) -> None:
    with pytest.raises(helm_python.HelmError, match="jobs contains TransferJobs, which the controller runs, but"):
        render_chart({"jobs": {"cats": {"spec": {}}}, "controller": {"enabled": False}})


def test_no_other_object_of_the_chart_is_a_transfer_job(render_chart: Render) -> None:
    # So helm uninstall deletes no TransferJob of a user.
    assert set(transfer_jobs(render_chart({"jobs": {"cats": {"spec": {"seed": 1}}}}))) == {"cats"}
    assert transfer_jobs(render_chart({})) == {}
