"""The flow as a whole."""

import time

from topwork.pipeline import clear_leftovers


def test_a_run_gives_back_its_own_half_written_uploads_and_spares_those_of_others(make_job, workspace):
    job, storage = make_job(), workspace.storage
    base = storage.uri.removeprefix(f"s3://{storage._bucket}/")
    for key in (f"runs/{job.run}/transfer/model.keras", "runs/other-12345678/transfer/model.keras"):
        storage._client.create_multipart_upload(Bucket=storage._bucket, Key=f"{base}/{key}")
    time.sleep(1.1)  # the server tells whole seconds
    clear_leftovers(job, workspace)
    left = storage._client.list_multipart_uploads(Bucket=storage._bucket, Prefix=base).get("Uploads", [])
    assert [upload["Key"] for upload in left] == [f"{base}/runs/other-12345678/transfer/model.keras"]
