"""The chart renders jobs to the same objects as `topwork render`: names, Jobs, digests and job specs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_render_properties import COMPUTE, KEY, VALUE

from topwork.cluster.manifests.render import RenderOptions, render
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_jobs, read_text

ROOT = Path(__file__).parents[2]
SPECS = [
    *sorted((ROOT / "examples").glob("*.yaml")),
    *sorted((ROOT / "tests" / "kubernetes" / "golden").glob("*/job.yaml")),
    ROOT / "tests" / "unit" / "valid_spec.yaml",
]
Render = Callable[..., dict[tuple[str, str], dict[str, Any]]]


def assert_same_objects(
    render_chart: Render, documents: list[dict[str, Any]], jobs: list[TransferJob], image: str = ""
) -> None:
    """Assert that the chart renders the documents to the same objects as `topwork render` renders the jobs."""
    entries = {
        document["metadata"]["name"]: {
            "labels": document["metadata"].get("labels", {}),
            "spec": document["spec"],
        }
        for document in documents
    }
    rendered = render_chart({"jobs": entries, "defaults": {"image": image}})
    placement = RenderOptions(image or None, namespace="ml")
    expected = {
        (manifest["kind"], manifest["metadata"]["name"]): manifest
        for job in jobs
        for manifest in render(job, placement).objects
    }
    actual = {key: rendered[key] for key in rendered if key in expected or key[0] == "Job"}
    for job in jobs:
        expected_data, data = expected["ConfigMap", job.run]["data"], actual["ConfigMap", job.run]["data"]
        assert data.keys() == expected_data.keys()
        # The style differs, but topwork and other YAML parsers read the same document.
        assert read_text(data["job.yaml"], "job.yaml") == [job]
        assert yaml.safe_load(data["job.yaml"]) == yaml.safe_load(expected_data["job.yaml"])
        actual["ConfigMap", job.run] = actual["ConfigMap", job.run] | {"data": expected_data}
    assert actual == expected


@pytest.mark.parametrize("path", SPECS, ids=lambda path: str(path.relative_to(ROOT)))
def test_chart_renders_the_same_job_as_topwork_render(path: Path, render_chart: Render) -> None:
    documents = [helm_python.values_from_yaml(text) for text in path.read_text(encoding="utf-8").split("\n---\n")]
    assert_same_objects(render_chart, [document for document in documents if document], read_jobs(path))


def test_job_uses_the_default_image(render_chart: Render) -> None:
    path = SPECS[0]
    assert_same_objects(
        render_chart, [helm_python.values_from_yaml(path.read_text())], read_jobs(path), "registry.example/topwork:1"
    )


SCRATCH = ("50Gi", "1.5Ti", "512Mi", "500M", "0.7Gi", "7Ki", "0.000000001Ti", "1048576.000000001k", "999999999999999Ti")


def test_chart_requests_the_same_disk_space_for_any_scratch_size(render_chart: Render) -> None:
    documents = [
        {
            "apiVersion": "topwork.dev/v1alpha1",
            "kind": "TransferJob",
            "metadata": {"name": f"scratch-{index}"},
            "spec": {
                "storage": "s3://bucket/prefix",
                "dataset": {
                    "source": {"tfds": "cats_vs_dogs"},
                    "splits": {"train": "train[:80%]", "test": "train[80%:]"},
                    "imageSize": [96, 96],
                },
                "model": {"base": {"application": "MobileNetV2"}},
                "compute": {"scratch": scratch, "prefetch": True},
            },
        }
        for index, scratch in enumerate(SCRATCH)
    ]
    assert_same_objects(render_chart, documents, [TransferJob.model_validate(document) for document in documents])


SHARE = st.floats(0, 1, exclude_max=True)
RATE = st.floats(0, 10, exclude_min=True)
COUNT = st.integers(1, 10000)
POSITIVE = st.floats(0, 1e6, exclude_min=True) | st.sampled_from([1, 1e6, 1e-7, 123456.75, 5e-324])
NAME = st.text(min_size=1, max_size=20)


def mapping(**optional: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={key.rstrip("_"): value for key, value in optional.items()})


OPTIMIZER = mapping(
    learningRate=RATE,
    momentum=SHARE,
    epsilon=POSITIVE,
    weightDecay=SHARE,
    clipnorm=POSITIVE,
    gradientAccumulationSteps=st.integers(2, 10000),
    ema=mapping(momentum=st.floats(0.1, 0.9)),
    schedule=st.fixed_dictionaries({"name": st.just("cosine"), "finalFraction": SHARE})
    | st.fixed_dictionaries({"name": st.just("step"), "factor": st.floats(0.1, 0.9), "atEpochs": st.just([1])}),
).map(lambda given: {"name": "rmsprop", "learningRate": 0.01} | given)
STOPPING = mapping(patience=st.integers(1, 1000), minDelta=st.floats(0, 1000))
CACHE = st.sampled_from(["auto", "off"]) | mapping(use=st.sampled_from(["auto", "on"]), views=st.just(1))
UNFREEZE = st.just("all") | st.fixed_dictionaries({"layers": COUNT}) | st.fixed_dictionaries({"from": NAME})
STEPS = st.fixed_dictionaries({"layers": COUNT, "epochs": COUNT, "learningRate": RATE}).map(lambda step: [step])
FINE_TUNE = st.fixed_dictionaries(
    {"epochs": st.integers(2, 10000)},
    optional={"unfreeze": UNFREEZE, "optimizer": OPTIMIZER, "earlyStopping": STOPPING, "batchSize": COUNT},
) | STEPS.map(lambda steps: {"unfreeze": {"steps": steps}})
SOURCE = (
    st.just({"tfds": "cats_vs_dogs"})
    | NAME.map(lambda name: {"archive": {"uri": f"https://host/{name}.zip", "root": name}})
    | st.tuples(NAME, NAME).map(
        lambda names: {"table": {"uri": "s3://bucket/a.csv", "image": names[0], "label": names[1]}}
    )
)
BASE = (
    st.fixed_dictionaries({"application": st.just("VGG16")}, optional={"weights": st.just("none")})
    | st.fixed_dictionaries({"cnn": st.fixed_dictionaries({"filters": st.lists(COUNT, min_size=1, max_size=3)})})
    | st.fixed_dictionaries({"saved": st.just({"uri": "s3://bucket/ä.keras"})}).map(lambda base: base)
    | (NAME | st.integers(-10000, 10000)).map(lambda cut: {"saved": {"uri": "s3://bucket/m.keras", "cutAt": cut}})
)
SPLITS = st.just({"train": "train[:80%]", "test": "train[80%:]"}) | st.fixed_dictionaries(
    {"train": st.floats(0.01, 0.9), "test": st.floats(0.001, 0.1)},
    optional={
        "stratify": st.booleans(),
        "groupBy": st.just("folder") | st.sampled_from(["(a)", "\\d+"]).map(lambda regex: {"regex": regex}),
    },
)
CLASSES = st.sampled_from(
    [["cat", "dog"], ["no", "1"], [{"0.5": ["true", "ä\u2028"]}, "~"], {"exclude": ["on", "=", "0o7"]}]
)
SPEC = st.fixed_dictionaries(
    {
        "storage": st.just("s3://bucket/prefix"),
        "dataset": st.fixed_dictionaries(
            {
                "source": SOURCE,
                "splits": SPLITS,
                "imageSize": st.tuples(st.integers(16, 2048), st.integers(16, 2048)).map(list),
            },
            optional={
                "maxRejectedRatio": SHARE,
                "onMissingClass": st.just("allow"),
                "classes": CLASSES,
                "audit": st.sampled_from([{"nearDuplicates": "off"}, {"nearDuplicates": "fail", "maxLeakRatio": 0.5}]),
            },
        ),
        "model": st.fixed_dictionaries({"base": BASE}, optional={"head": mapping(hidden=st.lists(COUNT, max_size=3))}),
    },
    optional={
        "augmentation": mapping(
            rotation=SHARE, zoom=SHARE, mixUp=st.floats(0, 10), randAugment=mapping(magnitude=SHARE)
        ),
        "transfer": mapping(
            epochs=st.integers(2, 10000),
            optimizer=OPTIMIZER,
            loss=st.sampled_from(["auto", {"name": "focal", "gamma": 1.5}, {}]),
            featureCache=CACHE,
            earlyStopping=STOPPING,
        ),
        "fineTune": FINE_TUNE,
        "evaluate": mapping(
            gates=st.lists(st.fixed_dictionaries({"metric": st.just("f1"), "atLeast": SHARE}), max_size=2)
        ),
        "seed": st.integers(0, 2**31 - 1),
        "metrics": mapping(lingerSeconds=st.integers(0, 600), pushgateway=st.just("http://gateway:9091")),
    },
)


# No shrinking: rendering takes at least 0.1 seconds.
PHASES = (Phase.explicit, Phase.generate)


@settings(max_examples=24, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=PHASES)
@given(SPEC, COMPUTE, st.dictionaries(KEY, VALUE, max_size=3))
@example(
    {
        "storage": "s3://b/ä\U0001f431\x7f",
        "dataset": {
            "source": {"archive": {"uri": "https://host/\u2028.zip", "root": 'ä"<&>\\u0008\U0001f431'}},
            "classes": [{"0.5": ["true", "ä\u2028\x85"]}, "no"],
            "splits": {"perClass": {"train": 1, "test": 1}},
            "imageSize": [16, 16],
        },
        "model": {"base": {"saved": {"uri": "s3://bucket/m.keras", "cutAt": "yes\b\f\n\x00"}}},
    },
    {"annotations": {"a": "0o7", "b": "12:30", "c": "ä\x7f\u2028", "d": "="}, "cpu": 0.0001, "prefetch": True},
    {"odd": "017"},
).via("strings that have several representations in YAML or JSON")
def test_chart_renders_any_valid_job_like_topwork_render(
    render_chart: Render, spec: dict[str, Any], compute: dict[str, Any], labels: dict[str, str]
) -> None:
    # Helm parses 4.0 as 4.
    if isinstance(cores := compute.get("cpu"), float) and cores.is_integer():
        compute = compute | {"cpu": int(cores)}
    document = {
        "apiVersion": "topwork.dev/v1alpha1",
        "kind": "TransferJob",
        "metadata": {"name": "any", "labels": labels},
        "spec": spec | {"compute": compute},
    }
    try:
        job = TransferJob.model_validate(document)
    except ValidationError:
        assume(False)
    assert_same_objects(render_chart, [document], [job])
