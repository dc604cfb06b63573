"""The embedded S3 server of the chart, started as its pod starts it, and the test of a release that checks it."""

import base64
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from topwork.cli import main

Render = Callable[..., dict[tuple[str, str], dict[str, Any]]]
RunPod = Callable[..., tuple[int, str, str]]
STORAGE_POD = ("Pod", "topwork-test-storage")
WEED = Path(sys.executable).parent
PORTS = ("master", "volume", "filer", "s3")
PATIENCE_SECONDS = 60.0


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def answer(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture(scope="module")
def server(rendered: Render, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """The container of the StatefulSet as a process here, on free ports; gives its URL and the Secret's variables."""
    objects = rendered({"seaweedfs": {"enabled": True}})
    pod = objects["StatefulSet", "topwork-seaweedfs"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    secret = objects["Secret", "topwork-s3"]["data"]
    variables = {name: base64.b64decode(value).decode() for name, value in secret.items()}
    folder = tmp_path_factory.mktemp("seaweedfs")
    (folder / "data").mkdir()
    # On one machine several tests run at once: other ports than those of the pod, and its folders elsewhere.
    numbers = free_ports(2 * len(PORTS))
    own = dict(zip(PORTS, numbers[: len(PORTS)], strict=True))
    flags = [f"-{name}.port={port}" for name, port in own.items()]
    flags += [f"-{name}.port.grpc={port}" for name, port in zip(PORTS, numbers[len(PORTS) :], strict=True)]
    (script,) = container["args"]
    script = script.replace("-s3.port=8333", " ".join(flags))
    environment = variables | {"PATH": f"{WEED}:{os.environ['PATH']}", "HOME": str(folder)}
    environment |= {"RUN_FOLDER": str(folder), "DATA_FOLDER": str(folder / "data"), "S3_ADDRESS": "127.0.0.1"}
    after = container["lifecycle"]["postStart"]["exec"]["command"][-1]
    master = f"{own['master']}.{numbers[len(PORTS)]}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*container["command"], script], env=environment, stdout=log, stderr=log)
        try:
            subprocess.run(
                ["sh", "-c", after.replace("127.0.0.1:9333", f"127.0.0.1:{master}")],
                env=environment,
                stdout=log,
                stderr=log,
                check=True,
                timeout=PATIENCE_SECONDS,
            )
            url = f"http://127.0.0.1:{own['s3']}"
            path = container["readinessProbe"]["httpGet"]["path"]
            until = time.monotonic() + PATIENCE_SECONDS
            while answer(f"{url}{path}") != 200:
                assert time.monotonic() < until, (folder / "log").read_text()[-2000:]
                time.sleep(0.1)
            yield url, variables
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run_test_pod(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the container of a test of the release here; gives its exit code and what it wrote."""

    def run(pod: dict[str, Any], environment: dict[str, str], replaced: str = "") -> tuple[int, str, str]:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        words = [word.replace("/etc/topwork", replaced) for word in pod["spec"]["containers"][0]["args"]]
        monkeypatch.setattr("sys.argv", ["topwork", *words])
        code: object = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        return int(str(code)), *capsys.readouterr()

    return run


def test_helm_test_stores_reads_and_deletes_in_the_bucket_that_the_server_made(
    server: tuple[str, dict[str, str]], rendered: Render, run_test_pod: RunPod
) -> None:
    url, variables = server
    assert variables["AWS_ENDPOINT_URL"] == "http://topwork-seaweedfs.ml.svc:8333"
    pod = rendered({"seaweedfs": {"enabled": True}})[STORAGE_POD]
    code, out, err = run_test_pod(pod, variables | {"AWS_ENDPOINT_URL": url})
    assert code == 0, err
    assert [line.split(" (")[0].split(" s3://")[0].strip() for line in out.splitlines()] == [
        "wrote",
        "read it back",
        "conditional write did not overwrite it",
        "deleted it",
        "s3://topwork ok",
    ]


def test_the_server_lets_nobody_in_without_its_keys(
    server: tuple[str, dict[str, str]], rendered: Render, run_test_pod: RunPod
) -> None:
    url, variables = server
    assert answer(f"{url}/topwork") == 403
    wrong = variables | {"AWS_ENDPOINT_URL": url, "AWS_SECRET_ACCESS_KEY": "x" * 40}
    code, _, err = run_test_pod(rendered({"seaweedfs": {"enabled": True}})[STORAGE_POD], wrong)
    assert (code, err.startswith("topwork: ")) == (2, True)


def test_helm_test_names_a_bucket_that_is_missing(
    server: tuple[str, dict[str, str]], rendered: Render, run_test_pod: RunPod
) -> None:
    url, variables = server
    objects = rendered({"tests": {"storage": "s3://no-such-bucket/prefix"}})
    code, _, err = run_test_pod(objects[STORAGE_POD], variables | {"AWS_ENDPOINT_URL": url})
    assert (code, "no-such-bucket" in err) == (2, True)


def test_helm_test_in_a_pod_without_the_secret_says_what_it_lacks(rendered: Render, run_test_pod: RunPod) -> None:
    environment = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nonexistent"}
    pod = rendered({"defaults": {"spec": {"storage": "s3://bucket"}}})[STORAGE_POD]
    code, _, err = run_test_pod(pod, environment)
    assert (code, "into the Secret topwork-s3 of the pod's namespace" in err) == (2, True)


def test_helm_test_checks_the_specs_that_the_pods_read(rendered: Render, run_test_pod: RunPod, tmp_path: Path) -> None:
    spec = {
        "storage": "s3://bucket",
        "dataset": {"source": {"tfds": "mnist"}, "splits": {"train": "train[:9%]"}, "imageSize": [32, 32]},
        "model": {"base": {"application": "VGG16"}},
    }
    objects = rendered({"jobs": {"cats": {"spec": spec}}})
    pod = objects["Pod", "topwork-test-jobs"]
    for volume in pod["spec"]["volumes"]:
        for source in volume.get("projected", {}).get("sources", ()):
            (item,) = source["configMap"]["items"]
            data = objects["ConfigMap", source["configMap"]["name"]]["data"]
            (tmp_path / item["path"]).write_text(data[item["key"]])
    code, _, err = run_test_pod(pod, {}, str(tmp_path))
    # A rule across keys, which no schema holds.
    assert code == 2
    assert "spec.dataset.splits.test: is required if there is no validation split" in err
