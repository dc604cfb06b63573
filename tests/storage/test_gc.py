"""`topwork gc`: leftovers that it deletes, and objects that it keeps."""

import json
from datetime import timedelta

import pytest
from typer.testing import CliRunner

from topwork.artifacts import write_artifact
from topwork.cli import app
from topwork.cli.runtime.shutdown import to_topwork_error
from topwork.registry.garbage_collection import delete_leftovers, find_leftovers
from topwork.registry.shared_features import delete_shared_features, mark_used
from topwork.registry.stage_results import write_reference
from topwork.registry.versions import Version, claim_version

ANY_AGE = timedelta(0)
PART_BYTES = 5 << 20


def write_complete_artifact(storage, prefix, directory, facts=None):
    directory.mkdir(exist_ok=True)
    (directory / "file").write_bytes(b"1234")
    write_artifact(storage, prefix, directory, facts or {})


def version(number, dataset):
    return Version(
        name="cats", version=number, uri="s3://…", run="cats-1", weights="0" * 64, published="2026-01-01T00:00:00Z",
        main_metric="accuracy", metrics={}, split="test", images=1, dataset=dataset,
    ).model_dump(mode="json")  # fmt: skip


FINISHED_MODEL = "stages/transfer/2222/model-0000000000000000.keras"
CONTINUED = "stages/transfer/continued/5555/00003-{key}-{input}.json"
ATTEMPT = f"attempt-{0:032x}"
# In the layout of version 0.1.0.
OLD_MODEL = "runs/cats-0/transfer/model-0000000000000000.keras"


@pytest.fixture
def referenced(storage, tmp_path):
    """Write an object of every kind that must be kept; returns all keys."""
    write_complete_artifact(storage, "datasets/cats/aaaa0000", tmp_path / "made")
    write_complete_artifact(storage, "datasets/dogs/bbbb0000", tmp_path / "made")
    write_complete_artifact(storage, "datasets/birds/cccc0000", tmp_path / "made")
    # The run is unfinished: it still needs its checkpoint and features.
    storage.write("runs/cats-1/pull/done.json", json.dumps({"dataset": "datasets/cats/aaaa0000"}).encode())
    write_complete_artifact(storage, "stages/transfer/1111/runs/cats-1/checkpoints/00001", tmp_path / "made")
    storage.write("stages/transfer/1111/runs/cats-1/features/train-0000000000.npy", b"features")
    storage.write("runs/cats-0/transfer/done.json", json.dumps({"key": OLD_MODEL}).encode())
    storage.write(OLD_MODEL, b"model")
    # The runs of these models were deleted; one model names its dataset only in its card, as older versions did.
    write_complete_artifact(storage, "models/cats/1", tmp_path / "made", version(1, "datasets/dogs/bbbb0000"))
    storage.write("models/cats/latest.json", json.dumps(version(1, "datasets/dogs/bbbb0000")).encode())
    (tmp_path / "made" / "card.md").write_text(f"| Dataset | {storage.uri}/datasets/birds/cccc0000 |")
    write_complete_artifact(storage, "models/cats/2", tmp_path / "made", version(2, ""))
    write_complete_artifact(storage, "mirror/tfds/mnist/3.0.1", tmp_path / "made")
    storage.write("weights/imagenet/VGG16.weights.h5", b"weights")
    storage.write("notes.txt", b"somebody's own")
    # Jobs with more epochs continue from this result.
    write_reference(storage, "cats-4", "transfer", "4444")
    storage.write("stages/transfer/4444/done.json", json.dumps({"key": "stages/transfer/4444/model"}).encode())
    write_complete_artifact(storage, "stages/transfer/4444/last-checkpoint/0a0b0c0d", tmp_path / "made")
    storage.write(CONTINUED.format(key="4444", input="0a0b0c0d"), b"{}")
    return {stored.key for stored in storage.list()}


@pytest.fixture
def with_leftovers(referenced, storage, tmp_path):
    """Add a leftover of every kind; returns the keys that must be kept."""
    storage.write("datasets/cats/dddd0000/stored_images-train.tfrecord-00000-of-00001", b"half")
    write_complete_artifact(storage, "datasets/cats/eeee0000", tmp_path / "made")
    claim_version(storage, "cats", "cats-9")
    storage.write("models/cats/3/model.keras", b"half")
    storage.write("stages/fine-tune/1111/runs/cats-1/checkpoints/00001/state.npz", b"half")
    storage.write("stages/fine-tune/1111/model-0123456789abcdef.keras", b"not named yet")
    write_reference(storage, "cats-2", "transfer", "2222")
    storage.write("stages/transfer/2222/done.json", json.dumps({"key": FINISHED_MODEL}).encode())
    storage.write(FINISHED_MODEL, b"model")
    storage.write("stages/transfer/2222/model-fedcba9876543210.keras", b"another process was faster")
    write_complete_artifact(storage, "stages/transfer/2222/runs/cats-2/checkpoints/00002", tmp_path / "made")
    storage.write("stages/transfer/2222/runs/cats-2/features/train-0000000000.npy", b"features")
    storage.write(f"datasets/cats/aaaa0000/{ATTEMPT}/stored_images-train.tfrecord", b"of a writer that was too late")
    # The run that used this result was deleted.
    storage.write("stages/fine-tune/3333/done.json", json.dumps({"key": "stages/fine-tune/3333/model"}).encode())
    storage.write("stages/fine-tune/3333/model", b"model")
    storage.write("stages/transfer/4444/last-checkpoint/ffffffff/state.npz", b"half")
    storage.write(CONTINUED.format(key="3333", input="0a0b0c0d"), b"the result of the stage was deleted")
    storage.write("features/6666/train/2-batches/000000.npy", b"features")
    mark_used(storage, "features/6666", "cats-5d41402a")
    upload = storage._client.create_multipart_upload(
        Bucket=storage._bucket, Key=f"{storage._key_prefix}runs/cats-3/big"
    )
    storage._client.upload_part(
        Bucket=storage._bucket, Key=f"{storage._key_prefix}runs/cats-3/big", UploadId=upload["UploadId"], PartNumber=1,
        Body=bytes(PART_BYTES),
    )  # fmt: skip
    storage._client.create_multipart_upload(Bucket=storage._bucket, Key=f"{storage._key_prefix}foreign/big")
    return referenced | {"runs/cats-2/transfer/done.json", "stages/transfer/2222/done.json", FINISHED_MODEL}


LEFTOVERS = {
    f"datasets/cats/aaaa0000/{ATTEMPT}": "half-written",
    "datasets/cats/dddd0000": "half-written",
    "datasets/cats/eeee0000": "unreferenced dataset",
    "features/6666": "unused features",
    "models/cats/3": "half-written",
    "runs/cats-3/big": "unfinished upload",
    "stages/fine-tune/1111/model-0123456789abcdef.keras": "half-written",
    "stages/fine-tune/1111/runs/cats-1/checkpoints/00001": "half-written",
    "stages/fine-tune/3333": "unreferenced stage result",
    "stages/transfer/2222/model-fedcba9876543210.keras": "finished stage",
    "stages/transfer/2222/runs/cats-2/checkpoints": "finished stage",
    "stages/transfer/2222/runs/cats-2/features": "finished stage",
    "stages/transfer/4444/last-checkpoint/ffffffff": "half-written",
    CONTINUED.format(key="3333", input="0a0b0c0d"): "finished stage",
}


def test_gc_keeps_everything_referenced_or_needed(referenced, storage):
    assert find_leftovers(storage, ANY_AGE) == []


def test_gc_deletes_every_kind_of_leftover_and_nothing_else(with_leftovers, storage):
    leftovers = find_leftovers(storage, ANY_AGE)
    assert {leftover.prefix: leftover.kind for leftover in leftovers} == LEFTOVERS
    sizes = {leftover.prefix: leftover.size for leftover in leftovers}
    assert sizes["runs/cats-3/big"] == PART_BYTES
    assert sizes["stages/fine-tune/1111/runs/cats-1/checkpoints/00001"] == len(b"half")
    assert [leftover.prefix for leftover in delete_leftovers(storage, leftovers)] == sorted(LEFTOVERS)
    assert {stored.key for stored in storage.list()} == with_leftovers
    assert [upload.key for upload in storage.multipart_uploads.list_incomplete(older_than_seconds=0)] == ["foreign/big"]
    assert find_leftovers(storage, ANY_AGE) == []


def test_gc_keeps_leftovers_younger_than_the_limit(with_leftovers, storage):
    assert find_leftovers(storage, timedelta(hours=1)) == []


def test_gc_keeps_leftovers_that_are_referenced_before_deletion(with_leftovers, storage, tmp_path):
    leftovers = find_leftovers(storage, ANY_AGE)
    storage.write("runs/new-1/pull/done.json", json.dumps({"dataset": "datasets/cats/eeee0000"}).encode())
    write_reference(storage, "new-1", "fine-tune", "3333")
    (tmp_path / "made" / "stored_images-train.tfrecord-00000-of-00001").write_bytes(b"whole")
    write_complete_artifact(storage, "datasets/cats/dddd0000", tmp_path / "made")
    mark_used(storage, "features/6666", "dogs-1a2b3c4d")
    write_complete_artifact(storage, "stages/transfer/3333/last-checkpoint/0a0b0c0d", tmp_path / "made")
    deleted = {leftover.prefix for leftover in delete_leftovers(storage, leftovers)}
    kept = {
        "datasets/cats/dddd0000",
        "datasets/cats/eeee0000",
        "features/6666",
        "stages/fine-tune/3333",
        CONTINUED.format(key="3333", input="0a0b0c0d"),
    }
    assert deleted == set(LEFTOVERS) - kept
    assert storage.size("datasets/cats/eeee0000/file") == storage.size("datasets/cats/dddd0000/file") == 4


@pytest.fixture
def command(storage, s3_settings, monkeypatch, tmp_path):
    for name, value in {
        "AWS_ENDPOINT_URL": s3_settings.endpoint_url,
        "AWS_ACCESS_KEY_ID": s3_settings.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key,
        "HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    return lambda *options: CliRunner().invoke(app, ["gc", storage.uri, *options])


def test_gc_dry_run_deletes_nothing_and_a_real_run_reports_freed_bytes(command, with_leftovers, storage):
    before = {stored.key for stored in storage.list()}
    dry_run = command("--dry-run", "--older-than", "0m")
    assert dry_run.exit_code == 0, dry_run.output
    for prefix, kind in LEFTOVERS.items():
        assert any(line.startswith(kind) and line.endswith(prefix) for line in dry_run.output.splitlines()), (
            dry_run.output
        )
    assert f"Would free 5.0 MiB: {len(LEFTOVERS)} leftovers in {storage.uri}." in dry_run.output
    assert {stored.key for stored in storage.list()} == before
    report = json.loads(command("--older-than", "0m", "--json").output)
    assert (report["dryRun"], {leftover["key"]: leftover["kind"] for leftover in report["found"]}) == (False, LEFTOVERS)
    assert {stored.key for stored in storage.list()} == with_leftovers
    assert command().output == f"Nothing to delete in {storage.uri} that is older than 24h.\n"


def test_gc_rejects_an_invalid_limit(command):
    assert str(to_topwork_error(command("--older-than", "soon").exception)) == (
        "--older-than is 'soon': expected a whole number of minutes, hours or days, such as 90m, 24h or 7d."
    )


def test_features_are_deleted_when_their_last_search_ends(storage):
    for key, owners in {"1111": ["cats-1"], "2222": ["cats-1", "dogs-1"], "3333": ["dogs-1"]}.items():
        storage.write(f"features/{key}/train/2-batches/000000.npy", b"features")
        for owner in owners:
            mark_used(storage, f"features/{key}", owner)
    delete_shared_features(storage, "cats-1")
    assert {stored.key.split("/")[1] for stored in storage.list("features/")} == {"2222", "3333"}
    delete_shared_features(storage, "dogs-1")
    assert not list(storage.list("features/"))
