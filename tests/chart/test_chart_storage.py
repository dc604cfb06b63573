"""The embedded S3 server of the chart and the `helm test` pod for the storage, run as local processes."""

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
BIN_DIRECTORY = Path(sys.executable).parent
SERVICES = ("master", "volume", "filer", "s3")
TIMEOUT_SECONDS = 60.0


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [free_socket.getsockname()[1] for free_socket in sockets]
    for free_socket in sockets:
        free_socket.close()
    return ports


def http_status(url: str) -> int:
    """Return the status code of the response, or 0 if the server does not respond."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture(scope="module")
def server(render_chart: Render, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """Run the container of the StatefulSet as a local process; yields its URL and the variables in the Secret."""
    objects = render_chart({"seaweedfs": {"enabled": True}})
    pod = objects["StatefulSet", "topwork-seaweedfs"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    secret = objects["Secret", "topwork-s3"]["data"]
    variables = {name: base64.b64decode(value).decode() for name, value in secret.items()}
    directory = tmp_path_factory.mktemp("seaweedfs")
    (directory / "data").mkdir()
    # Tests may run in parallel on one machine: use free ports and a temporary directory.
    ports = free_ports(2 * len(SERVICES))
    http_ports = dict(zip(SERVICES, ports[: len(SERVICES)], strict=True))
    flags = [f"-{name}.port={port}" for name, port in http_ports.items()]
    flags += [f"-{name}.port.grpc={port}" for name, port in zip(SERVICES, ports[len(SERVICES) :], strict=True)]
    (script,) = container["args"]
    script = script.replace("-s3.port=8333", " ".join(flags))
    environment = variables | {"PATH": f"{BIN_DIRECTORY}:{os.environ['PATH']}", "HOME": str(directory)}
    environment |= {"RUN_FOLDER": str(directory), "DATA_FOLDER": str(directory / "data"), "S3_ADDRESS": "127.0.0.1"}
    post_start = container["lifecycle"]["postStart"]["exec"]["command"][-1]
    master = f"{http_ports['master']}.{ports[len(SERVICES)]}"
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([*container["command"], script], env=environment, stdout=log, stderr=log)
        try:
            subprocess.run(
                ["sh", "-c", post_start.replace("127.0.0.1:9333", f"127.0.0.1:{master}")],
                env=environment,
                stdout=log,
                stderr=log,
                check=True,
                timeout=TIMEOUT_SECONDS,
            )
            url = f"http://127.0.0.1:{http_ports['s3']}"
            path = container["readinessProbe"]["httpGet"]["path"]
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while http_status(f"{url}{path}") != 200:
                assert time.monotonic() < deadline, (directory / "log").read_text()[-2000:]
                time.sleep(0.1)
            yield url, variables
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def run_test_pod(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the container of the `helm test` pod in this process; returns its exit code, stdout and stderr."""

    def run(pod: dict[str, Any], environment: dict[str, str]) -> tuple[int, str, str]:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.argv", ["topwork", *pod["spec"]["containers"][0]["args"]])
        code: object = 0
        try:
            main()
        except SystemExit as error:
            code = error.code or 0
        return int(str(code)), *capsys.readouterr()

    return run


def test_storage_test_writes_reads_and_deletes_an_object_in_the_embedded_server(
    server: tuple[str, dict[str, str]], render_chart: Render, run_test_pod: RunPod
) -> None:
    url, variables = server
    assert variables["AWS_ENDPOINT_URL"] == "http://topwork-seaweedfs.ml.svc:8333"
    pod = render_chart({"seaweedfs": {"enabled": True}})[STORAGE_POD]
    code, out, err = run_test_pod(pod, variables | {"AWS_ENDPOINT_URL": url})
    assert code == 0, err
    assert [line.split(" (")[0].split(" s3://")[0].strip() for line in out.splitlines()] == [
        "put",
        "conditional put",
        "get",
        "multipart upload",
        "abort of a multipart upload",
        "list",
        "delete",
        "head",
        "s3://topwork ok",
    ]


def test_embedded_server_rejects_requests_without_valid_credentials(
    server: tuple[str, dict[str, str]], render_chart: Render, run_test_pod: RunPod
) -> None:
    url, variables = server
    assert http_status(f"{url}/topwork") == 403
    wrong_variables = variables | {"AWS_ENDPOINT_URL": url, "AWS_SECRET_ACCESS_KEY": "x" * 40}
    code, _, err = run_test_pod(render_chart({"seaweedfs": {"enabled": True}})[STORAGE_POD], wrong_variables)
    assert (code, err.startswith("topwork: ")) == (75, True)


def test_storage_test_reports_a_missing_bucket(
    server: tuple[str, dict[str, str]], render_chart: Render, run_test_pod: RunPod
) -> None:
    url, variables = server
    objects = render_chart({"tests": {"storage": "s3://no-such-bucket/prefix"}})
    code, _, err = run_test_pod(objects[STORAGE_POD], variables | {"AWS_ENDPOINT_URL": url})
    assert (code, "no-such-bucket" in err) == (2, True)


def test_storage_test_reports_missing_credentials(render_chart: Render, run_test_pod: RunPod) -> None:
    environment = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nonexistent"}
    pod = render_chart({"defaults": {"spec": {"storage": "s3://bucket"}}})[STORAGE_POD]
    code, _, err = run_test_pod(pod, environment)
    assert (code, "to the Secret topwork-s3 in the pod's namespace" in err) == (2, True)
