"""The pipeline: cleanup, and the spec that is stored before the stages start."""

import threading
import time
from dataclasses import replace

import pytest

from topwork.nodes.group import NodeGroup
from topwork.nodes.node import Node
from topwork.pipeline import abort_incomplete_uploads, run_pull, store_spec
from topwork.registry.stage_results import attempt_prefix
from topwork.spec.loading.loader import read_text
from topwork.stages import pull as pull_module


def test_run_aborts_its_incomplete_uploads_but_not_recent_uploads_of_other_runs(make_job, workspace):
    job, storage = make_job(), workspace.storage
    base = storage.uri.removeprefix(f"s3://{storage._bucket}/")
    # A run does not know its stage keys before its dataset: another run can have the same ones.
    own, other = (f"{attempt_prefix('transfer', '0a' * 8, run)}/x" for run in (job.run, "other-12345678"))
    shared = f"stages/transfer/{'0a' * 8}/model-{'0b' * 8}.keras"
    for key in (f"runs/{job.run}/report.html", "runs/other-12345678/report.html", own, other, shared):
        storage._client.create_multipart_upload(Bucket=storage._bucket, Key=f"{base}/{key}")
    time.sleep(1.1)  # the server reports whole seconds
    abort_incomplete_uploads(job, workspace)
    remaining = storage._client.list_multipart_uploads(Bucket=storage._bucket, Prefix=base).get("Uploads", [])
    expected = sorted(f"{base}/{key}" for key in ("runs/other-12345678/report.html", other, shared))
    assert sorted(upload["Key"] for upload in remaining) == expected


def test_stored_spec_belongs_to_the_same_run(make_job, workspace):
    job = make_job()
    store_spec(job, workspace)
    (stored,) = read_text(workspace.storage.read(f"runs/{job.run}/spec.yaml").decode(), "spec.yaml")
    assert stored.run == job.run


def test_pull_stores_the_spec_and_aborts_no_uploads(make_job, workspace):
    job, storage = make_job(), workspace.storage
    key = f"{storage.uri.removeprefix(f's3://{storage._bucket}/')}/runs/{job.run}/report.html"
    storage._client.create_multipart_upload(Bucket=storage._bucket, Key=key)
    time.sleep(1.1)  # the server reports whole seconds
    assert run_pull(job, workspace).metadata.images == 40
    remaining = storage._client.list_multipart_uploads(Bucket=storage._bucket, Prefix=key).get("Uploads", [])
    assert [upload["Key"] for upload in remaining] == [key]
    assert storage.size(f"runs/{job.run}/spec.yaml") > 0


@pytest.mark.parametrize("attempt", ["", "uid-2"])
def test_other_nodes_wait_until_the_chief_has_pulled_in_this_attempt(make_job, workspace, monkeypatch, attempt):
    monkeypatch.setattr(pull_module, "WAIT_POLL_SECONDS", 0.01)
    job = make_job()
    if attempt:
        # The source may have changed since an earlier attempt.
        run_pull(job, replace(workspace, attempt="uid-1"))
    peer = replace(workspace, attempt=attempt, nodes=NodeGroup(Node(1, ("unused:1", "unused:2"), "unused:3")))
    found = []
    waiting = threading.Thread(target=lambda: found.append(run_pull(job, peer)), daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    pulled = run_pull(job, replace(workspace, attempt=attempt))
    waiting.join(60)
    assert [dataset.prefix for dataset in found] == [pulled.prefix]
