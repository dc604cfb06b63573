"""The TransferJob models: defaults, digest, strictness and accepted values."""

from typing import Any

import pytest
from pydantic import Strict, ValidationError

from topwork.spec import TransferJob
from topwork.spec.kubernetes_types import cpu_to_millicores
from topwork.spec.schema import key_types

MINIMAL: dict[str, Any] = {
    "apiVersion": "topwork.dev/v1alpha1",
    "kind": "TransferJob",
    "metadata": {"name": "least"},
    "spec": {
        "storage": "s3://bucket/prefix",
        "dataset": {
            "source": {"tfds": "cats_vs_dogs"},
            "splits": {"train": "train[:80%]", "test": "train[80%:]"},
            "imageSize": [96, 96],
        },
        "model": {"base": {"application": "MobileNetV2"}},
        "fineTune": {"epochs": 1},
    },
}
OPTIMIZER = {
    "name": "adam",
    "learningRate": 0.001,
    "schedule": {
        "name": "constant",
        "warmupEpochs": 0.0,
        "finalFraction": 0.0,
        "rate": None,
        "factor": None,
        "atEpochs": [],
    },
    "momentum": None,
    "nesterov": None,
    "beta1": None,
    "beta2": None,
    "rho": None,
    "epsilon": None,
    "weightDecay": None,
    "clipnorm": None,
    "globalClipnorm": None,
    "clipvalue": None,
    "gradientAccumulationSteps": None,
    "ema": None,
}
DEFAULTS = {
    "dataset": {
        "source": {"tfds": "cats_vs_dogs", "folder": None, "archive": None, "table": None},
        "classes": None,
        "splits": {
            "train": "train[:80%]",
            "validation": None,
            "test": "train[80%:]",
            "pinTest": None,
            "predefined": False,
            "stratify": True,
            "groupBy": None,
            "perClass": None,
            "folds": None,
            "fold": None,
        },
        "imageSize": [96, 96],
        "imageFit": "stretch",
        "valueRange": "auto",
        "onCorruptImage": "skip",
        "maxRejectedRatio": 0.2,
        "onContradiction": "drop",
        "onMissingClass": "fail",
        "audit": {"nearDuplicates": "warn", "labelIssues": "off", "maxLeakRatio": 0.0},
    },
    "model": {
        "base": {"application": "MobileNetV2", "weights": None, "saved": None, "cnn": None},
        "head": {"pooling": "avg", "hidden": [], "dropout": 0.2},
    },
    "augmentation": {
        "flip": "none",
        "rotation": 0.0,
        "zoom": 0.0,
        "translation": 0.0,
        "contrast": 0.0,
        "brightness": 0.0,
        "randAugment": None,
        "mixUp": 0.0,
        "cutMix": 0.0,
    },
    "transfer": {
        "train": "head",
        "epochs": 10,
        "batchSize": 64,
        "optimizer": OPTIMIZER,
        "loss": "auto",
        "classWeights": "none",
        "earlyStopping": None,
        "featureCache": "auto",
    },
    "fineTune": {
        "epochs": 1,
        "unfreeze": "all",
        "batchSize": None,
        "optimizer": OPTIMIZER | {"learningRate": 1e-5},
        "classWeights": None,
        "earlyStopping": None,
        "keep": "best",
        "featureCache": "auto",
    },
    "evaluate": {"metrics": ["accuracy", "f1", "auc"], "gates": [], "calibration": "none"},
    "publish": {"enabled": True, "name": None, "formats": ["keras", "savedModel"], "fold": None},
    "compute": {
        "image": None,
        "nodes": 1,
        "gpus": 1,
        "cpu": 4,
        "memory": "16Gi",
        "sharedMemory": "2Gi",
        "scratch": "50Gi",
        "precision": "auto",
        "queue": None,
        "deadlineSeconds": 86400,
        "retries": 3,
        "ttlSecondsAfterFinished": 86400,
        "nodeSelector": {},
        "tolerations": [],
        "affinity": {},
        "topology": None,
        "priorityClassName": None,
        "serviceAccountName": None,
        "imagePullSecrets": [],
        "annotations": {},
        "extraCA": None,
        "prefetch": False,
        "terminationGracePeriodSeconds": 300,
        "checkpointMinutes": 10.0,
        "keepCheckpoint": False,
    },
    "metrics": {"pushgateway": None, "lingerSeconds": 0},
    "tracking": {"tensorboard": False, "mlflow": None},
    "seed": 42,
    "suspend": False,
    "storage": "s3://bucket/prefix",
}


def with_spec(**changes: Any) -> TransferJob:
    return TransferJob.model_validate(MINIMAL | {"spec": MINIMAL["spec"] | changes})


def test_defaults() -> None:
    job = TransferJob.model_validate(MINIMAL)
    assert job.model_dump(mode="json", by_alias=True)["spec"] == DEFAULTS


def test_defaults_of_optional_sections() -> None:
    job = with_spec(
        dataset={
            "source": {"archive": {"uri": "a.zip"}},
            "splits": {"perClass": {"train": 9, "validation": 1, "test": 3}},
            "imageSize": [96, 96],
        },
        model={"base": {"saved": {"uri": "a.keras"}}},
        augmentation={"randAugment": {}},
        transfer={"loss": {}, "earlyStopping": {}, "optimizer": {"ema": {}}},
        compute={"extraCA": {"configMap": "company-ca"}},
    ).model_dump(mode="json", by_alias=True)["spec"]
    assert job["dataset"]["source"]["archive"] == {"uri": "a.zip", "root": "", "sha256": None, "encoding": None}
    assert job["model"]["base"]["saved"] == {"uri": "a.keras", "cutAt": None, "scaling": None}
    assert job["augmentation"]["randAugment"] == {"operations": 2, "magnitude": 0.5}
    assert job["transfer"]["loss"] == {"name": "auto", "labelSmoothing": 0.0, "gamma": 2.0}
    assert job["transfer"]["earlyStopping"] == {"monitor": "loss", "patience": 3, "minDelta": 0.0}
    assert job["transfer"]["optimizer"]["ema"] == {"momentum": 0.99}
    assert job["compute"]["extraCA"] == {"configMap": "company-ca", "key": "ca.crt"}


def test_digest_of_a_spec_is_stable() -> None:
    # The digest is part of the names of runs and Jobs. If it changes for the same spec, `topwork submit` creates a new
    # Job, whose attempts do not use the checkpoints of the old one. Results of stages are found by their own keys.
    # A new field does not change it, because only values that differ from their defaults count.
    job = TransferJob.model_validate(MINIMAL)
    assert job.digest == "f5704826069407c470cf7e5e710d52053b9f5f27fd41c36a7a0aabe897f9c0c0"
    assert job.run == f"least-{job.digest[:8]}"


def test_digest_excludes_fields_that_do_not_affect_the_result() -> None:
    metadata = {"name": "least", "namespace": "team-a", "labels": {"team": "vision"}, "annotations": {"note": "a b"}}
    job = TransferJob.model_validate(MINIMAL | {"metadata": metadata})
    compute = {"image": "a:1", "gpus": 2, "cpu": "500m", "extraCA": {"configMap": "company-ca"}, "prefetch": True}
    with_other_compute = with_spec(compute=compute, metrics={"lingerSeconds": 5}, suspend=True)
    assert {job.digest, with_other_compute.digest} == {TransferJob.model_validate(MINIMAL).digest}


def test_digest_excludes_values_that_equal_their_defaults() -> None:
    explicit = MINIMAL["spec"] | {key: value for key, value in DEFAULTS.items() if key != "metrics"}
    assert with_spec(**explicit).digest == TransferJob.model_validate(MINIMAL).digest


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"transfer": {"epochs": 11}},
        {"storage": "s3://bucket/other"},
        {"compute": {"precision": "float32"}},
        # Gates, formats and checks of the data change no weights, but whether the Job fails and what it publishes.
        {"dataset": {**MINIMAL["spec"]["dataset"], "onMissingClass": "allow"}},
        {"dataset": {**MINIMAL["spec"]["dataset"], "audit": {"nearDuplicates": "fail"}}},
        {"evaluate": {"gates": [{"metric": "accuracy", "atLeast": 0.9}]}},
        {"publish": {"formats": ["keras"]}},
    ],
)
def test_digest_depends_on_fields_that_affect_the_result(changes: dict[str, Any]) -> None:
    assert with_spec(**changes).digest != TransferJob.model_validate(MINIMAL).digest


def test_digest_ignores_the_notation_of_numbers() -> None:
    as_integer = with_spec(transfer={"optimizer": {"learningRate": 1}})
    assert as_integer.digest == with_spec(transfer={"optimizer": {"learningRate": 1.0}}).digest


@pytest.mark.parametrize("by_alias", [True, False])
def test_job_survives_a_round_trip(by_alias: bool) -> None:
    job = with_spec(
        transfer={"loss": {"name": "focal", "gamma": 3.0}, "optimizer": {"schedule": {"name": "cosine"}}},
        fineTune={"unfreeze": {"steps": [{"layers": 2, "epochs": 1, "learningRate": 1e-5}]}},
        compute={"cpu": 0.5, "tolerations": [{"operator": "Exists"}], "extraCA": {"configMap": "company-ca"}},
    )
    assert TransferJob.model_validate(job.model_dump(mode="json", by_alias=by_alias)) == job
    assert TransferJob.model_validate_json(job.model_dump_json(by_alias=by_alias)) == job


@pytest.mark.parametrize(
    ("cpu", "millicores"), [(4, 4000), (0.5, 500), (1.5, 1500), (1e-9, 1), (0.1, 100), ("500m", 500), ("2.25", 2250)]
)
def test_cpu_is_converted_to_millicores(cpu: Any, millicores: int) -> None:
    assert cpu_to_millicores(with_spec(compute={"cpu": cpu}).spec.compute.cpu) == millicores


@pytest.mark.parametrize("unfreeze", ["all", {"layers": 3}, {"from": "block_13_expand"}], ids=["all", "layers", "from"])
def test_unfreeze_accepts_each_form(unfreeze: Any) -> None:
    job = with_spec(fineTune={"epochs": 1, "unfreeze": unfreeze})
    assert job.model_dump(by_alias=True)["spec"]["fineTune"]["unfreeze"] == unfreeze


@pytest.mark.parametrize("cut_at", ["flatten", -3])
def test_cut_at_accepts_a_name_or_an_index(cut_at: Any) -> None:
    job = with_spec(model={"base": {"saved": {"uri": "s3://bucket/a.keras", "cutAt": cut_at}}})
    assert job.spec.model.base.saved
    assert job.spec.model.base.saved.cut_at == cut_at


def test_model_errors_contain_no_secrets() -> None:
    with pytest.raises(ValidationError) as caught:
        with_spec(storage="s3://key:hush-hush@bucket/prefix", seed="hush-hush")
    assert "hush-hush" not in str(caught.value)


def test_job_is_frozen() -> None:
    job = TransferJob.model_validate(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        job.spec.seed = 1  # type: ignore[misc]


def test_every_number_and_boolean_is_strict() -> None:
    not_strict = [
        f"{path}.{key}"
        for path, model in key_types.walk_models(TransferJob)
        for key, field in key_types.fields_by_key(model).items()
        for expanded in key_types.expand_types(field.annotation, field.metadata)
        if expanded.python_type in {int, float, bool} and not expanded.find(Strict)
    ]
    assert not_strict == []


def test_every_key_has_a_description() -> None:
    undescribed = [
        f"{path}.{key}"
        for path, model in key_types.walk_models(TransferJob)
        for key, field in key_types.fields_by_key(model).items()
        if not (field.description or "").endswith(".")
    ]
    assert undescribed == []


@pytest.mark.parametrize(
    "changes",
    [
        # The same optimizer in both stages, with a much lower rate in the second.
        {
            "transfer": {"optimizer": {"name": "sgd", "learningRate": 0.2, "momentum": 0.9}},
            "fineTune": {"epochs": 5, "optimizer": {"name": "sgd", "learningRate": 0.01, "momentum": 0.9}},
        },
        # Learning rates of different optimizers are not comparable.
        {"fineTune": {"epochs": 5, "optimizer": {"name": "sgd", "learningRate": 0.01}}},
        # An equal learning rate is not higher.
        {"fineTune": {"epochs": 5, "optimizer": {"learningRate": 0.001}}},
        # A base with random weights has nothing to lose.
        {
            "model": {"base": {"cnn": {"filters": [8]}}},
            "transfer": {"train": "all"},
            "fineTune": {"epochs": 5, "optimizer": {"learningRate": 0.01}},
        },
    ],
)
def test_fine_tune_learning_rate_is_accepted(changes: dict[str, Any]) -> None:
    with_spec(**changes)


def test_single_gpu_supports_accumulation_and_any_batch_size() -> None:
    with_spec(transfer={"batchSize": 7, "optimizer": {"gradientAccumulationSteps": 4}}, compute={"gpus": 1})


@pytest.mark.parametrize("method", ["clipnorm", "globalClipnorm", "clipvalue"])
def test_several_gpus_support_each_clipping_method(method: str) -> None:
    with_spec(transfer={"batchSize": 8, "optimizer": {method: 1.0}}, compute={"gpus": 2})


@pytest.mark.parametrize(("nodes", "gpus", "replicas"), [(1, 0, 1), (1, 4, 4), (3, 0, 3), (3, 1, 3), (2, 4, 8)])
def test_replicas_are_the_gpus_of_all_nodes_or_one_per_node(nodes: int, gpus: int, replicas: int) -> None:
    job = with_spec(compute={"nodes": nodes, "gpus": gpus}, transfer={"batchSize": 24})
    assert job.spec.compute.replicas == replicas


@pytest.mark.parametrize("topology", [{}, {"pack": "a"}, {"spread": "a"}, {"pack": "a", "spread": "b/c"}])
def test_topology_places_the_pods_of_several_nodes(topology: dict[str, str]) -> None:
    compute = with_spec(compute={"nodes": 2, "topology": topology}).spec.compute
    assert compute.topology
    assert compute.topology.model_dump(exclude_none=True) == topology


def test_test_split_is_optional_with_a_validation_split() -> None:
    splits = {"train": "train[:80%]", "validation": "train[80%:]"}
    with_spec(dataset=MINIMAL["spec"]["dataset"] | {"splits": splits})


@pytest.mark.parametrize(
    "source",
    [
        {"tfds": "mnist"},
        {"tfds": "imagenet_resized/32x32:0.1.*"},
        {"folder": {"uri": "s3://photos"}},
        {"folder": {"uri": "s3://bucket/prefix2/"}},
        {"folder": {"uri": "../photos of cats"}},
        {"archive": {"uri": "https://host/download?id=12", "root": "PetImages"}},
        {"archive": {"uri": "s3://bucket/a/b@c.tar.xz"}},
        {"table": {"uri": "labels.JSONL"}},
    ],
    ids=str,
)
def test_source_accepts_each_form(source: dict[str, Any]) -> None:
    with_spec(dataset=MINIMAL["spec"]["dataset"] | {"source": source})


@pytest.mark.parametrize(
    "uri", ["s3://bucket", "s3://bucket/", "s3://bucket/prefix", "s3://bucket/prefix/", "s3://bucket/prefix/photos/"]
)
@pytest.mark.parametrize("storage", ["s3://bucket/prefix", "s3://bucket/prefix/"])
def test_storage_must_not_overlap_the_image_folder(storage: str, uri: str) -> None:
    dataset = MINIMAL["spec"]["dataset"] | {"source": {"folder": {"uri": uri}}}
    with pytest.raises(ValidationError, match=r"overlaps spec\.dataset\.source\.folder\.uri"):
        with_spec(storage=storage, dataset=dataset)


@pytest.mark.parametrize(
    "kind", [{"table": {"uri": "s3://bucket/prefix/a.csv"}}, {"archive": {"uri": "s3://bucket/prefix/a.zip"}}]
)
def test_tables_and_archives_may_be_in_the_storage(kind: dict[str, Any]) -> None:
    with_spec(dataset=MINIMAL["spec"]["dataset"] | {"source": kind})
