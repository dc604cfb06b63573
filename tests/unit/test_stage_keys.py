"""Keys of stage results: what changes them, and what must never change them."""

from typing import Any

import pytest
from pydantic import Field
from tests.unit.test_spec_job import MINIMAL, with_spec

from topwork.registry.stage_keys import cluster_run_name, run_name, stage_keys
from topwork.spec import TransferJob
from topwork.spec.digest import digest_of, training_content
from topwork.spec.job import JobSpec
from topwork.spec.training import Transfer

FINGERPRINT = "0123456789abcdef"
FINE_TUNE = {"epochs": 1, "optimizer": {"name": "adam", "learningRate": 1e-5}}
DATASET = MINIMAL["spec"]["dataset"]


def keys(storage, fingerprint=FINGERPRINT, **changes):
    return stage_keys(with_spec(fineTune=FINE_TUNE, **changes), fingerprint, storage)


def test_keys_of_a_spec_are_stable(storage) -> None:
    # If a key changes for the same spec, every job trains again. A new spec key must not change it; a stage that
    # computes something else needs a new format number and a changelog entry.
    job = with_spec(fineTune=FINE_TUNE)
    found = stage_keys(job, FINGERPRINT, storage)
    assert (found.transfer, found.fine_tune, found.publish) == (
        "50422c647d28fa5a",
        "4279c37014cce0d5",
        "99e68f3df63e511b",
    )
    assert (run_name(job, found), cluster_run_name(job, FINGERPRINT, storage)) == ("least-0cfcb7da", "least-013fd61c")


def test_new_key_with_a_default_changes_no_digest() -> None:
    class FutureTransfer(Transfer):
        label_budget: int = Field(default=7, description="A key of a later version.")

    class FutureSpec(JobSpec):
        transfer: FutureTransfer = FutureTransfer()
        priority: str | None = None

    for spec in (MINIMAL["spec"], with_spec(transfer={"epochs": 3}).spec.model_dump(by_alias=True, exclude_unset=True)):
        today, future = JobSpec.model_validate(spec), FutureSpec.model_validate(spec)
        assert training_content(future) == training_content(today)
    changed = FutureSpec.model_validate(MINIMAL["spec"] | {"transfer": {"labelBudget": 8}})
    assert digest_of(training_content(changed)) != digest_of(training_content(today))


@pytest.mark.parametrize(
    "changes",
    [
        {"transfer": {"epochs": 10, "featureCache": "auto", "train": "head"}},
        {"dataset": {**DATASET, "audit": {"nearDuplicates": "warn", "labelIssues": "off"}}},
        {"transfer": {}, "augmentation": {}, "evaluate": {}, "publish": {}, "metrics": {}},
        {"transfer": {"optimizer": {"name": "adam", "learningRate": 0.001}}},
        {"compute": {"gpus": 4, "cpu": 16, "precision": "auto"}},
        {"compute": {"nodes": 2, "topology": {"pack": "topology.kubernetes.io/zone"}}},
        {"dataset": {**DATASET, "imageFit": "stretch"}},
        {"dataset": {**DATASET, "maxRejectedRatio": 0.5, "onCorruptImage": "fail", "onMissingClass": "allow"}},
    ],
)
def test_explicit_defaults_resources_and_checks_change_no_key(storage, changes: dict[str, Any]) -> None:
    assert keys(storage, **changes) == keys(storage)


@pytest.mark.parametrize(
    "evaluate",
    [{"gates": [{"metric": "accuracy", "atLeast": 0.9}]}, {"gates": [{"metric": "f1", "atLeastLatestMinus": 0.1}]}],
)
def test_gates_change_no_key(storage, evaluate: dict[str, Any]) -> None:
    assert keys(storage, evaluate=evaluate) == keys(storage)


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluate": {"metrics": ["accuracy", "top5"]}},
        {"publish": {"formats": ["keras"]}},
        {"publish": {"name": "another"}},
    ],
)
def test_metrics_formats_and_name_change_only_the_key_of_publishing(storage, changes: dict[str, Any]) -> None:
    changed, before = keys(storage, **changes), keys(storage)
    assert (changed.transfer, changed.fine_tune) == (before.transfer, before.fine_tune)
    assert changed.publish != before.publish


@pytest.mark.parametrize(
    "fine_tune", [FINE_TUNE | {"epochs": 2}, FINE_TUNE | {"unfreeze": {"layers": 2}}, FINE_TUNE | {"keep": "last"}]
)
def test_fine_tune_does_not_change_the_key_of_transfer(storage, fine_tune: dict[str, Any]) -> None:
    changed = stage_keys(with_spec(fineTune=fine_tune), FINGERPRINT, storage)
    before = keys(storage)
    assert changed.transfer == before.transfer
    assert changed.fine_tune != before.fine_tune
    assert changed.publish != before.publish


@pytest.mark.parametrize(
    "changes",
    [
        {"compute": {"gpus": 0, "precision": "float32"}},
        {"seed": 1},
        {"augmentation": {"rotation": 0.1}},
        {"transfer": {"epochs": 11}},
        {"dataset": {**DATASET, "imageSize": [64, 64]}},
        {"dataset": {**DATASET, "imageFit": "crop"}},
        {"dataset": {**DATASET, "valueRange": "full"}},
        {"model": {"base": {"application": "ResNet50"}}},
    ],
)
def test_everything_that_affects_the_weights_changes_all_keys(storage, changes: dict[str, Any]) -> None:
    changed, before = keys(storage, **changes), keys(storage)
    assert changed.transfer != before.transfer
    assert changed.fine_tune != before.fine_tune
    assert changed.publish != before.publish


def test_selected_classes_change_keys_through_the_images_only(storage) -> None:
    # The fingerprint of the images covers the selection, in any notation.
    changes = {"dataset": {**DATASET, "classes": [{"pet": ["dog", "cat"]}, "fox"]}}
    assert keys(storage, **changes) == keys(storage)
    assert with_spec(**changes).digest != with_spec().digest


@pytest.mark.parametrize("audit", [{"nearDuplicates": "fail"}, {"nearDuplicates": "off"}, {"labelIssues": "report"}])
def test_audit_trains_nothing_again_but_is_part_of_what_is_published(storage, audit: dict[str, Any]) -> None:
    changed, before = keys(storage, dataset={**DATASET, "audit": audit}), keys(storage)
    assert changed.training_stages == before.training_stages
    assert changed.publish != before.publish


def test_other_images_change_all_keys_and_the_run(storage) -> None:
    job = with_spec(fineTune=FINE_TUNE)
    before, changed = stage_keys(job, FINGERPRINT, storage), stage_keys(job, "fedcba9876543210", storage)
    assert changed.transfer != before.transfer
    assert run_name(job, changed) != run_name(job, before)
    assert cluster_run_name(job, FINGERPRINT, storage) != cluster_run_name(job, "fedcba9876543210", storage)


def test_jobs_with_other_names_share_their_training_keys(storage) -> None:
    other = TransferJob.model_validate(MINIMAL | {"metadata": {"name": "other"}})
    mine = TransferJob.model_validate(MINIMAL)
    assert stage_keys(other, FINGERPRINT, storage).training == stage_keys(mine, FINGERPRINT, storage).training
    assert stage_keys(other, FINGERPRINT, storage).publish != stage_keys(mine, FINGERPRINT, storage).publish


def test_another_file_of_the_base_changes_the_key(storage, tmp_path) -> None:
    local, remote = tmp_path / "base.keras", f"{storage.uri}/bases/base.keras"
    for uri in (str(local), remote):
        found = set()
        for content in (b"first", b"second"):
            local.write_bytes(content)
            storage.write("bases/base.keras", content)
            job = with_spec(model={"base": {"saved": {"uri": uri}}})
            found.add(stage_keys(job, FINGERPRINT, storage).transfer)
        assert len(found) == 2, uri
