"""The flow as a whole."""

import time

from topwork.pipeline import clear_leftovers, keep_spec, run_pull
from topwork.spec.loading.loader import read_text


def test_a_run_gives_back_its_own_half_written_uploads_and_spares_those_of_others(make_job, workspace):
    job, storage = make_job(), workspace.storage
    base = storage.uri.removeprefix(f"s3://{storage._bucket}/")
    for key in (f"runs/{job.run}/transfer/model.keras", "runs/other-12345678/transfer/model.keras"):
        storage._client.create_multipart_upload(Bucket=storage._bucket, Key=f"{base}/{key}")
    time.sleep(1.1)  # the server tells whole seconds
    clear_leftovers(job, workspace)
    left = storage._client.list_multipart_uploads(Bucket=storage._bucket, Prefix=base).get("Uploads", [])
    assert [upload["Key"] for upload in left] == [f"{base}/runs/other-12345678/transfer/model.keras"]


def test_the_spec_of_a_run_is_kept_and_reads_as_the_same_run(make_job, workspace):
    job = make_job()
    keep_spec(job, workspace)
    (kept,) = read_text(workspace.storage.read(f"runs/{job.run}/spec.yaml").decode(), "spec.yaml")
    assert kept.run == job.run


def test_a_pull_alone_keeps_the_spec_and_leaves_the_uploads_of_others_to_them(make_job, workspace):
    job, storage = make_job(), workspace.storage
    key = f"{storage.uri.removeprefix(f's3://{storage._bucket}/')}/runs/{job.run}/transfer/model.keras"
    storage._client.create_multipart_upload(Bucket=storage._bucket, Key=key)
    time.sleep(1.1)  # the server tells whole seconds
    assert run_pull(job, workspace).facts.images == 40
    left = storage._client.list_multipart_uploads(Bucket=storage._bucket, Prefix=key).get("Uploads", [])
    assert [upload["Key"] for upload in left] == [key]
    assert storage.size(f"runs/{job.run}/spec.yaml") > 0
