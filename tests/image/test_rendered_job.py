"""The rendered Job of tests/fixtures/jobs/solar-transfer.yaml, run in the image container by container."""

import json
import subprocess
import sys
import urllib.request

import pytest
from tests.image.conftest import read_fixture_job

from topwork.cluster.names import METRICS_PORTS, STAGES
from topwork.cluster.termination_message import TerminationMessage

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

PREDICT_WITH_KERAS = """
import json, sys
import keras, numpy as np
from PIL import Image
model, path = sys.argv[1:]
image = np.asarray(Image.open(path).convert("RGB").resize((96, 96)), np.float32)
print(json.dumps(keras.models.load_model(model).predict(image[np.newaxis], verbose=0)[0].tolist()))
"""


@pytest.fixture
def transfer_pod(make_pod, solar_base):
    """The pod and the job of solar-transfer, which uses the model of solar-base."""
    job = read_fixture_job("solar-transfer")
    return make_pod(job), job


def test_rendered_job_publishes_a_model_that_plain_keras_loads(transfer_pod, solar, tmp_path):
    pod, job = transfer_pod
    terminated = {}
    for stage in STAGES:
        container = pod.start(stage)
        container.wait_for_metric(f'topwork_stage_running{{stage="{stage}"}}')
        assert container.port == METRICS_PORTS[stage]
        # Prometheus still scrapes terminated containers, which must not appear as targets that are down.
        for earlier in STAGES[: STAGES.index(stage)]:
            with urllib.request.urlopen(f"http://127.0.0.1:{METRICS_PORTS[earlier]}/metrics", timeout=60) as response:
                assert response.read() == b""
        assert container.command_line(1) == ["tini", "--", "topwork", *pod.containers[stage]["args"]]
        assert container.user_ids() == {"65532"}
        terminated[stage] = container.wait()
        assert terminated[stage].exit_code == 0, terminated[stage].log
        assert terminated[stage].changed_files == []
    assert pod.volumes_over_limit() == []

    latest = json.loads(solar.read(f"models/{job.model_name}/latest.json"))
    model = solar.uri_of(f"models/{job.model_name}/{latest['version']}")
    metrics = json.loads(solar.at(model).read("metrics.json"))["metrics"]
    result = terminated["transfer"].lines("done")[0]
    best = terminated["transfer"].lines("epoch", epoch=result["best_epoch"])[0]
    kept = terminated["fine-tune"].lines("kept weights")[-1]["weights"].partition(" (")[0]
    common = {"outcome": "done", "exit_code": 0, "run": job.run}
    assert [terminated[stage].termination_message for stage in STAGES] == [
        TerminationMessage(stage="pull", **common),
        TerminationMessage(
            stage="transfer",
            **common,
            epochs=25,
            metric="validation_accuracy",
            value=best["validation_accuracy"],
            weights_from=f"transfer, epoch {result['best_epoch']}",
        ),
        TerminationMessage(
            stage="fine-tune",
            **common,
            epochs=13,
            metric="accuracy",
            value=metrics["accuracy"],
            model=model,
            weights_from=kept,
        ),
    ]

    solar.at(model).download("model.keras", tmp_path / "model.keras")
    image = tmp_path / "cell.png"
    rows = solar.read("pictures/poly.csv").decode().splitlines()
    image.write_bytes(solar.read(f"pictures/{rows[1].split(',')[0]}"))
    completed = subprocess.run(
        [sys.executable, "-c", PREDICT_WITH_KERAS, tmp_path / "model.keras", image],
        capture_output=True,
        text=True,
        check=True,
    )
    assert sum(json.loads(completed.stdout)) == pytest.approx(1, abs=1e-5)
