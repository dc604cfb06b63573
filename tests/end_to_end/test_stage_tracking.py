"""Containers of a job whose MLflow server cannot be reached, while its event files are stored."""

from topwork.spec.loading.loader import read_jobs


def test_stages_complete_without_the_mlflow_server_and_store_their_event_files(pod, write_job, storage):
    job = write_job(
        tracking={"tensorboard": True, "mlflow": {"uri": "http://127.0.0.1:1", "secretName": "mlflow-token"}},
        fineTune={"epochs": 1, "optimizer": {"learningRate": 1e-5}},
    )
    (spec,) = read_jobs(job)
    logs = {}
    for stage in ("pull", "transfer", "fine-tune"):
        code, message, container = pod.run(stage, job, MLFLOW_TRACKING_TOKEN="token-of-the-user")
        assert (code, message.outcome) == (0, "done"), container.output
        assert "token-of-the-user" not in container.output
        # `lines` also checks that every line is JSON.
        logs[stage] = [line for line in container.lines if line["message"].startswith("tracking")]
    assert not logs["pull"]
    for stage in ("transfer", "fine-tune"):
        interrupted, incomplete = logs[stage]
        assert (interrupted["message"], interrupted["service"]) == ("tracking interrupted", "MLflow")
        assert "http://127.0.0.1:1 failed: it cannot be reached" in interrupted["reason"]
        hint = f"topwork track sync {storage.uri} {spec.run}"
        assert (incomplete["message"], incomplete["hint"]) == ("tracking incomplete", hint)
    keys = [stored.key for stored in storage.list(f"runs/{spec.run}/events/")]
    assert [key.split("/")[3] for key in keys] == ["fine-tune", "transfer"]
