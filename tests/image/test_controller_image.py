"""Image of the controller: the target `controller` of the Dockerfile."""

import json
import os
import urllib.request
from contextlib import suppress

import pytest
import yaml
from api_server import ApiServer
from controller_process import until
from sample_objects import CPU_SPEC
from simulated_controllers import SimulatedControllers
from tests.image.conftest import CA_BUNDLE, prepare_base_image, run_build
from tests.image.podman import LIMITS, run_podman

import topwork
from topwork.clients.kubernetes.cluster import ClusterSettings, connect
from topwork.cluster.definition.custom_resource import CUSTOM_RESOURCES, definition

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

IMAGE = f"topwork:{topwork.__version__}-controller"
# The official base image, python:3.11-slim-bookworm, has 130 MB. Optuna, with NumPy and SQLAlchemy, has about 110 MB.
MAX_ADDED_BYTES = 280e6
READ_ONLY = ("--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--security-opt=no-new-privileges")
PORT = 18480


@pytest.fixture(scope="module")
def image() -> str:
    base = prepare_base_image()
    ca_options = [f"CA={CA_BUNDLE}"] if CA_BUNDLE.exists() else []
    run_build("make", "image", "BUILDER=podman", "ACCELERATOR=controller", f"IMAGE={IMAGE}", *ca_options)
    return base


def inspect(name):
    (metadata,) = json.loads(run_podman("image", "inspect", name).stdout)
    return metadata


def run(*arguments, entrypoint=None):
    options = ["--entrypoint", entrypoint] if entrypoint else []
    return run_podman("run", "--rm", *LIMITS, *READ_ONLY, *options, IMAGE, *arguments).stdout


def test_image_size_is_below_its_limit(image, capsys):
    size, base = inspect(IMAGE)["Size"], inspect(image)["Size"]
    with capsys.disabled():
        print(f" {size / 1e6:.0f} MB, of which {base / 1e6:.0f} MB are the base image", end=" ")
    assert size - base < MAX_ADDED_BYTES


def test_image_runs_the_controller_under_tini_as_a_numeric_user(image):
    config = inspect(IMAGE)["Config"]
    assert (config["User"], config["Entrypoint"]) == ("65532:65532", ["tini", "--", "topwork", "controller"])
    assert config["Labels"]["org.opencontainers.image.version"] == topwork.__version__


def test_image_shows_its_options_on_a_read_only_root(image):
    assert run("--help").startswith("Usage: topwork controller [OPTIONS]")


def test_image_prints_the_definitions_for_the_upgrade_hook_of_the_chart(image):
    printed = [*yaml.safe_load_all(run("crd", entrypoint="topwork"))]
    assert printed == [definition(resource) for resource in CUSTOM_RESOURCES]


def test_image_has_no_tensorflow_and_no_s3_client(image):
    code = "import importlib.util as u; print([n for n in ('tensorflow', 'keras', 'scipy', 'boto3') if u.find_spec(n)])"
    assert run("-c", code, entrypoint="python3") == "[]\n"


@pytest.fixture
def container(image, tmp_path):
    """The controller in its image, connected to the tests' API server in the network of the host."""
    with ApiServer(crds=[definition()]) as server:
        file = server.kubeconfig(tmp_path / "kubeconfig")
        file.chmod(0o644)
        name = f"topwork-controller-{os.getpid()}"
        options = ["--network", "host", "--volume", f"{file}:/etc/kubeconfig:ro", "--env", "KUBECONFIG=/etc/kubeconfig"]
        arguments = [f"--http-port={PORT}"]
        run_podman("run", "--detach", "--name", name, *LIMITS, *READ_ONLY, *options, IMAGE, *arguments)
        yield server, name, file
        run_podman("rm", "--force", name, check=False)


def page(path):
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=5) as response:
        return response.read().decode()
    return ""


def test_container_completes_a_transfer_job_and_stops_gracefully(container):
    server, name, file = container
    obj = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "cats"}, "spec": CPU_SPEC}
    with SimulatedControllers(server):
        until(lambda: page("/readyz") == "ok\n", "readiness")
        connect(ClusterSettings(kubeconfig=str(file))).apply(obj)
        until(
            lambda: (server.get("TransferJob", "cats").get("status") or {}).get("state") == "Complete", "complete run"
        )
    run_podman("stop", "--time", "30", name)
    assert run_podman("inspect", "--format", "{{.State.ExitCode}}", name).stdout == "0\n"
    assert server.get("Lease", "topwork-controller")["spec"]["holderIdentity"] == ""
