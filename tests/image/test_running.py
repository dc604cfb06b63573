"""The rendered Job of the demo's transfer example, run from the image container by container, to a published model."""

import json
import subprocess
import sys
import urllib.request

import pytest
from tests.image.conftest import example

from topwork.cluster.names import METRICS_PORTS, STAGES
from topwork.cluster.termination_message import TerminationMessage

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

PLAIN_KERAS = """
import json, sys
import keras, numpy as np
from PIL import Image
file, picture = sys.argv[1:]
image = np.asarray(Image.open(picture).convert("RGB").resize((96, 96)), np.float32)
print(json.dumps(keras.models.load_model(file).predict(image[np.newaxis], verbose=0)[0].tolist()))
"""


@pytest.fixture
def transfer_pod(make_pod, solar_base):
    """The pod of the transfer example and its job, on the model of the base example."""
    job = example("solar-transfer")
    return make_pod(job), job


def test_the_rendered_job_publishes_a_model_that_plain_keras_loads(transfer_pod, solar, tmp_path):
    pod, job = transfer_pod
    ended = {}
    for stage in STAGES:
        container = pod.start(stage)
        container.until_metrics(f'topwork_stage_running{{stage="{stage}"}}')
        assert container.port == METRICS_PORTS[stage]
        # Prometheus still knows the containers that are over, and shall not take them for targets that are down.
        for earlier in STAGES[: STAGES.index(stage)]:
            with urllib.request.urlopen(f"http://127.0.0.1:{METRICS_PORTS[earlier]}/metrics", timeout=60) as answer:
                assert answer.read() == b""
        assert container.process(1) == ["tini", "--", "topwork", *pod.containers[stage]["args"]]
        assert container.owners() == {"65532"}
        ended[stage] = container.wait()
        assert ended[stage].exit_code == 0, ended[stage].log
        assert ended[stage].written == []
    assert pod.overfull() == []

    latest = json.loads(solar.read(f"models/{job.model_name}/latest.json"))
    model = solar.uri_of(f"models/{job.model_name}/{latest['version']}")
    metrics = json.loads(solar.at(model).read("metrics.json"))["metrics"]
    transferred = ended["transfer"].lines("done")[0]
    kept = ended["transfer"].lines("epoch", epoch=transferred["best_epoch"])[0]
    common = {"outcome": "done", "exit_code": 0, "run": job.run}
    assert [ended[stage].ending for stage in STAGES] == [
        TerminationMessage(stage="pull", **common),
        TerminationMessage(stage="transfer", **common, epochs=25, metric="validation_accuracy", value=kept["validation_accuracy"]),
        TerminationMessage(stage="fine-tune", **common, epochs=13, metric="accuracy", value=metrics["accuracy"], model=model),
    ]

    solar.at(model).download("model.keras", tmp_path / "model.keras")
    picture = tmp_path / "cell.png"
    rows = solar.read("pictures/poly.csv").decode().splitlines()
    picture.write_bytes(solar.read(f"pictures/{rows[1].split(',')[0]}"))
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN_KERAS, tmp_path / "model.keras", picture],
        capture_output=True,
        text=True,
        check=True,
    )
    assert sum(json.loads(plain.stdout)) == pytest.approx(1, abs=1e-5)
