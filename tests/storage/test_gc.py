"""`topwork gc`: what is deleted and, above all, what is kept."""

import json
from datetime import timedelta

import pytest
from typer.testing import CliRunner

from topwork.artifacts import write_artifact
from topwork.cli import app
from topwork.cli.runtime.shutdown import to_topwork_error
from topwork.registry.garbage_collection import delete_leftovers, find_leftovers
from topwork.registry.versions import Version, claim_version

AT_ONCE = timedelta(0)
PART_BYTES = 5 << 20


def write_complete_artifact(storage, prefix, folder, facts=None):
    folder.mkdir(exist_ok=True)
    (folder / "file").write_bytes(b"1234")
    write_artifact(storage, prefix, folder, facts or {})


def version(number, dataset):
    return Version(
        name="cats", version=number, uri="s3://…", run="cats-1", weights="0" * 64, published="2026-01-01T00:00:00Z",
        main_metric="accuracy", metrics={}, split="test", images=1, dataset=dataset,
    ).model_dump(mode="json")  # fmt: skip


NAMED = "runs/cats-2/transfer/model-0000000000000000.keras"


@pytest.fixture
def used(storage, tmp_path):
    """Storage with one of everything that must be kept; returns the keys."""
    write_complete_artifact(storage, "datasets/cats/aaaa0000", tmp_path / "made")
    write_complete_artifact(storage, "datasets/dogs/bbbb0000", tmp_path / "made")
    write_complete_artifact(storage, "datasets/birds/cccc0000", tmp_path / "made")
    # The run is unfinished: it still needs its checkpoint and features.
    storage.write("runs/cats-1/pull/done.json", json.dumps({"dataset": "datasets/cats/aaaa0000"}).encode())
    write_complete_artifact(storage, "runs/cats-1/transfer/checkpoints/00001", tmp_path / "made")
    storage.write("runs/cats-1/transfer/features/train-0000000000.npy", b"features")
    # The runs of these models were deleted; one model names its dataset only in its card, as older versions did.
    write_complete_artifact(storage, "models/cats/1", tmp_path / "made", version(1, "datasets/dogs/bbbb0000"))
    storage.write("models/cats/latest.json", json.dumps(version(1, "datasets/dogs/bbbb0000")).encode())
    (tmp_path / "made" / "card.md").write_text(f"| Dataset | {storage.uri}/datasets/birds/cccc0000 |")
    write_complete_artifact(storage, "models/cats/2", tmp_path / "made", version(2, ""))
    write_complete_artifact(storage, "mirror/tfds/mnist/3.0.1", tmp_path / "made")
    storage.write("weights/imagenet/VGG16.weights.h5", b"weights")
    storage.write("notes.txt", b"somebody's own")
    return {stored.key for stored in storage.list()}


@pytest.fixture
def littered(used, storage, tmp_path):
    """The same with one of everything that can be deleted; returns what is kept, and what is deleted by kind."""
    storage.write("datasets/cats/dddd0000/stored_images-train.tfrecord-00000-of-00001", b"half")
    write_complete_artifact(storage, "datasets/cats/eeee0000", tmp_path / "made")
    claim_version(storage, "cats", "cats-9")
    storage.write("models/cats/3/model.keras", b"half")
    storage.write("runs/cats-1/fine-tune/checkpoints/00001/state.npz", b"half")
    storage.write("runs/cats-1/fine-tune/model-0123456789abcdef.keras", b"not named yet")
    storage.write("runs/cats-2/transfer/done.json", json.dumps({"key": NAMED}).encode())
    storage.write(NAMED, b"model")
    storage.write("runs/cats-2/transfer/model-fedcba9876543210.keras", b"another process was faster")
    write_complete_artifact(storage, "runs/cats-2/transfer/checkpoints/00002", tmp_path / "made")
    storage.write("runs/cats-2/transfer/features/train-0000000000.npy", b"features")
    upload = storage._client.create_multipart_upload(
        Bucket=storage._bucket, Key=f"{storage._key_prefix}runs/cats-3/big"
    )
    storage._client.upload_part(
        Bucket=storage._bucket, Key=f"{storage._key_prefix}runs/cats-3/big", UploadId=upload["UploadId"], PartNumber=1,
        Body=bytes(PART_BYTES),
    )  # fmt: skip
    storage._client.create_multipart_upload(Bucket=storage._bucket, Key=f"{storage._key_prefix}foreign/big")
    return used | {"runs/cats-2/transfer/done.json", NAMED}


GOES = {
    "datasets/cats/dddd0000": "half-written",
    "datasets/cats/eeee0000": "unreferenced dataset",
    "models/cats/3": "half-written",
    "runs/cats-1/fine-tune/checkpoints/00001": "half-written",
    "runs/cats-1/fine-tune/model-0123456789abcdef.keras": "half-written",
    "runs/cats-2/transfer/checkpoints": "finished stage",
    "runs/cats-2/transfer/features": "finished stage",
    "runs/cats-2/transfer/model-fedcba9876543210.keras": "finished stage",
    "runs/cats-3/big": "unfinished upload",
}


def test_gc_keeps_everything_referenced_or_needed(used, storage):
    assert find_leftovers(storage, AT_ONCE) == []


def test_gc_deletes_every_kind_of_leftover_and_nothing_else(littered, storage):
    found = find_leftovers(storage, AT_ONCE)
    assert {leftover.prefix: leftover.kind for leftover in found} == GOES
    sizes = {leftover.prefix: leftover.size for leftover in found}
    assert sizes["runs/cats-3/big"] == PART_BYTES
    assert sizes["runs/cats-1/fine-tune/checkpoints/00001"] == len(b"half")
    assert [leftover.prefix for leftover in delete_leftovers(storage, found)] == sorted(GOES)
    assert {stored.key for stored in storage.list()} == littered
    assert [upload.key for upload in storage.multipart_uploads.list_incomplete(older_than_seconds=0)] == ["foreign/big"]
    assert find_leftovers(storage, AT_ONCE) == []


def test_gc_keeps_what_is_younger_than_the_limit(littered, storage):
    assert find_leftovers(storage, timedelta(hours=1)) == []


def test_gc_keeps_what_is_referenced_before_it_is_deleted(littered, storage, tmp_path):
    found = find_leftovers(storage, AT_ONCE)
    storage.write("runs/new-1/pull/done.json", json.dumps({"dataset": "datasets/cats/eeee0000"}).encode())
    (tmp_path / "made" / "stored_images-train.tfrecord-00000-of-00001").write_bytes(b"whole")
    write_complete_artifact(storage, "datasets/cats/dddd0000", tmp_path / "made")
    gone = {leftover.prefix for leftover in delete_leftovers(storage, found)}
    assert gone == set(GOES) - {"datasets/cats/dddd0000", "datasets/cats/eeee0000"}
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


def test_gc_dry_run_deletes_nothing_and_a_real_run_reports_freed_bytes(command, littered, storage):
    before = {stored.key for stored in storage.list()}
    shown = command("--dry-run", "--older-than", "0m")
    assert shown.exit_code == 0, shown.output
    for prefix, kind in GOES.items():
        assert any(line.startswith(kind) and line.endswith(prefix) for line in shown.output.splitlines()), shown.output
    assert f"Would free 5.0 MiB: {len(GOES)} leftovers in {storage.uri}." in shown.output
    assert {stored.key for stored in storage.list()} == before
    done = json.loads(command("--older-than", "0m", "--json").output)
    assert (done["dryRun"], {one["key"]: one["kind"] for one in done["found"]}) == (False, GOES)
    assert {stored.key for stored in storage.list()} == littered
    assert command().output == f"Nothing to delete in {storage.uri} that is older than 24h.\n"


def test_gc_rejects_an_invalid_limit(command):
    assert str(to_topwork_error(command("--older-than", "soon").exception)) == (
        "--older-than is 'soon': expected a whole number of minutes, hours or days, such as 90m, 24h or 7d."
    )
