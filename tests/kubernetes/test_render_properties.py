"""Property tests: any spec.compute renders objects that are valid in Kubernetes and meet Pod Security restricted."""

import io
from typing import Any

import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from object_validation import TRICKY_STRINGS, VERSIONS, assert_valid_object
from pydantic import ValidationError
from ruamel.yaml import YAML

from topwork.cluster.manifests.render import RenderOptions, render
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_text
from topwork.spec.yaml_output import dump_yaml

TEXT = st.text(max_size=20) | st.sampled_from(TRICKY_STRINGS)
NAME = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?", fullmatch=True)
KEY = st.from_regex(r"([a-z]{1,5}\.[a-z]{1,3}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,20}[A-Za-z0-9])?", fullmatch=True)
VALUE = st.from_regex(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,20}[A-Za-z0-9])?)?", fullmatch=True) | st.sampled_from(
    ["yes", "on", "1", "1e3", "0x1F", "010", "null", "true", "1.0", ""]
)
QUANTITY = st.from_regex(r"[1-9][0-9]{0,3}(\.[0-9]{1,2})?(k|M|G|T|Ki|Mi|Gi|Ti)", fullmatch=True)
CPU = st.integers(1, 1024) | st.floats(0, 1024, exclude_min=True) | st.sampled_from(["500m", "1", "2.25", "999999m"])
EXPRESSIONS = st.lists(
    st.fixed_dictionaries({"key": KEY, "operator": st.sampled_from(["In", "NotIn"]), "values": st.lists(VALUE)}),
    max_size=2,
)
NODE_TERMS = st.lists(st.fixed_dictionaries({"matchExpressions": EXPRESSIONS}), min_size=1, max_size=2)
POD_TERM = st.fixed_dictionaries(
    {"topologyKey": KEY},
    optional={
        "labelSelector": st.fixed_dictionaries({"matchLabels": st.dictionaries(KEY, VALUE, max_size=2)}),
        "namespaces": st.lists(NAME, max_size=2),
        "matchLabelKeys": st.lists(KEY, max_size=2),
    },
)
REQUIRED, PREFERRED = (
    "requiredDuringSchedulingIgnoredDuringExecution",
    "preferredDuringSchedulingIgnoredDuringExecution",
)
PODS = st.fixed_dictionaries(
    {},
    optional={
        REQUIRED: st.lists(POD_TERM, max_size=2),
        PREFERRED: st.lists(
            st.fixed_dictionaries({"weight": st.integers(1, 100), "podAffinityTerm": POD_TERM}), max_size=2
        ),
    },
)
AFFINITY = st.fixed_dictionaries(
    {},
    optional={
        "nodeAffinity": st.fixed_dictionaries(
            {},
            optional={
                REQUIRED: st.fixed_dictionaries({"nodeSelectorTerms": NODE_TERMS}),
                PREFERRED: st.lists(
                    st.fixed_dictionaries(
                        {
                            "weight": st.integers(1, 100),
                            "preference": st.fixed_dictionaries({"matchExpressions": EXPRESSIONS}),
                        }
                    ),
                    max_size=2,
                ),
            },
        ),
        "podAffinity": PODS,
        "podAntiAffinity": PODS,
    },
)
TOLERATION = st.fixed_dictionaries({"key": KEY}, optional={"value": VALUE, "operator": st.just("Equal")}) | st.just(
    {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}
)
COMPUTE = st.fixed_dictionaries(
    {},
    optional={
        "nodes": st.sampled_from([1, 2, 4]),
        "gpus": st.sampled_from([0, 1, 2, 16]),
        "cpu": CPU,
        "memory": QUANTITY,
        "sharedMemory": QUANTITY,
        "scratch": QUANTITY,
        "queue": NAME,
        "deadlineSeconds": st.integers(60, 2**31 - 1),
        "retries": st.integers(0, 100),
        "ttlSecondsAfterFinished": st.integers(0, 2**31 - 1),
        "nodeSelector": st.dictionaries(KEY, VALUE, max_size=3),
        "tolerations": st.lists(TOLERATION, max_size=3),
        "affinity": AFFINITY,
        "priorityClassName": NAME,
        "serviceAccountName": NAME,
        "imagePullSecrets": st.lists(NAME, max_size=3, unique=True),
        "annotations": st.dictionaries(KEY, TEXT, max_size=3),
        "extraCA": st.fixed_dictionaries(
            {"configMap": NAME}, optional={"key": st.sampled_from(["ca.crt", ".hidden", "_a-B.1"])}
        ),
        "prefetch": st.booleans(),
        "terminationGracePeriodSeconds": st.integers(30, 3600),
    },
)
property_settings = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def make(compute: dict[str, Any], labels: dict[str, str]) -> TransferJob:
    data = {
        "apiVersion": "topwork.dev/v1alpha1",
        "kind": "TransferJob",
        "metadata": {"name": "any", "labels": labels},
        "spec": {
            "storage": "s3://bucket/prefix",
            "dataset": {
                "source": {"tfds": "cats_vs_dogs"},
                "splits": {"train": "train[:80%]", "test": "train[80%:]"},
                "imageSize": [96, 96],
            },
            "model": {"base": {"application": "MobileNetV2"}},
            "compute": compute,
        },
    }
    try:
        return TransferJob.model_validate(data)
    except ValidationError as error:
        # The only rule that these strategies can violate.
        assume("which includes it" not in str(error))
        raise


@property_settings
@given(COMPUTE, st.dictionaries(KEY, VALUE, max_size=3))
@example({"annotations": {str(index): text for index, text in enumerate(TRICKY_STRINGS)}}, {"odd": "yes"})
def test_objects_are_valid_and_restricted_and_survive_a_yaml_round_trip(
    compute: dict[str, Any], labels: dict[str, str]
) -> None:
    job = make(compute, labels)
    objects = render(job, RenderOptions()).objects
    for obj in objects:
        assert_valid_object(obj, (VERSIONS[0], VERSIONS[-1]))
    assert read_text(objects[0]["data"]["job.yaml"], "job.yaml") == [job]
    text = dump_yaml(objects)
    # As YAML 1.1, which kubectl reads, and as YAML 1.2.
    assert list(yaml.safe_load_all(text)) == objects
    assert list(YAML(typ="safe", pure=True).load_all(io.StringIO(text))) == objects
