"""Fixtures of the image tests: the built image, pods of rendered Jobs, a real S3 server, and jobs on solar cells."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.image.pod import Namespace, Pod
from tests.image.podman import LIMITS, MISSING, is_podman_missing, run_podman

from topwork.clients.s3.storage import Storage, StorageSettings, create_bucket
from topwork.cluster.manifests.render import RenderedObjects, RenderOptions, render
from topwork.cluster.names import STORAGE_SECRET
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_jobs

# Pulling or building the base image, installing TensorFlow and writing 2 GB can take a long time on a slow machine.
BUILD_SECONDS = 1500
# The CA certificates of this machine, for networks with their own certificate authority.
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


@pytest.fixture(scope="session")
def image() -> str:
    """Name of the CPU image, built from this source tree with podman's build cache."""
    prepare_base_image()
    job = read_fixture_job("solar-transfer")
    name = str(render(job, RenderOptions()).training["spec"]["template"]["spec"]["containers"][0]["image"])
    ca_options = [f"CA={CA_BUNDLE}"] if CA_BUNDLE.exists() else []
    run_build("make", "image", "BUILDER=podman", "ACCELERATOR=cpu", f"IMAGE={name}", *ca_options)
    return name


def prepare_base_image() -> str:
    """Pull or build the base image of the Dockerfile, and return its name; skip the test without podman."""
    if is_podman_missing():
        if os.environ.get("CI") == "true":
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    line = next(line for line in Path("Dockerfile").read_text().splitlines() if line.startswith("ARG BASE="))
    base = line.removeprefix("ARG BASE=")
    run_build("tests/image/base_image.sh", base)
    return base


def run_build(*command: str) -> None:
    """Run a build command. With `chroot` isolation, build steps require no permission to start containers."""
    completed = subprocess.run(
        command,
        env=os.environ | {"BUILDAH_ISOLATION": "chroot"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    assert completed.returncode == 0, completed.stdout


def read_fixture_job(name: str, **spec: Any) -> TransferJob:
    """Read a job of tests/fixtures; keyword arguments replace top-level keys of its spec."""
    (job,) = read_jobs(Path("tests/fixtures/jobs") / f"{name}.yaml")
    content = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return TransferJob.model_validate(content | {"spec": content["spec"] | spec})


@pytest.fixture(scope="session")
def secret(s3_settings: StorageSettings) -> dict[str, str]:
    """Data of the storage Secret."""
    return {
        "AWS_ENDPOINT_URL": s3_settings.endpoint_url or "",
        "AWS_ACCESS_KEY_ID": s3_settings.access_key or "",
        "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key or "",
        "AWS_REGION": s3_settings.region or "us-east-1",
    }


@pytest.fixture(scope="session")
def solar(s3_settings: StorageSettings, secret: dict[str, str]) -> Storage:
    """Storage of the jobs, with the images of solar cells."""
    uri = read_fixture_job("solar-transfer").spec.storage
    create_bucket(s3_settings, uri.removeprefix("s3://").split("/")[0])
    subprocess.run([sys.executable, "examples/solar/upload_images.py", uri], env=os.environ | secret, check=True)
    return Storage(uri, s3_settings)


class PodFactory:
    """Creates the pods of rendered Jobs as the Job controller does, and removes their containers after the test."""

    def __init__(self, directory: Path, secret: dict[str, str]) -> None:
        self._directory = directory
        self._secret = secret
        self._pods: list[Pod] = []

    def __call__(self, job: TransferJob, secret: dict[str, str] | None = None) -> Pod:
        """Create the pod of a job; `secret` replaces the data of the storage Secret, and an empty one removes it."""
        rendered: RenderedObjects = render(job, RenderOptions())
        config_map = rendered.config_map
        secret = self._secret if secret is None else secret
        namespace = Namespace(
            config_maps={config_map["metadata"]["name"]: config_map["data"]},
            secrets={STORAGE_SECRET: secret} if secret else {},
        )
        self._pods.append(Pod(rendered.training["spec"]["template"], namespace, self._directory))
        return self._pods[-1]

    def remove(self) -> None:
        """Remove all containers."""
        for pod in self._pods:
            pod.remove()


@pytest.fixture
def make_pod(image: str, secret: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Pod]]:
    """Function that creates the pod of a job."""
    pods = PodFactory(tmp_path, secret)
    yield pods
    pods.remove()


@pytest.fixture(scope="session")
def solar_base(
    image: str, secret: dict[str, str], solar: Storage, tmp_path_factory: pytest.TempPathFactory
) -> TransferJob:
    """The job that trains the base of solar-transfer. It has already completed in the image."""
    job = read_fixture_job("solar-base")
    pods = PodFactory(tmp_path_factory.mktemp("solar-base"), secret)
    pod = pods(job)
    for name in pod.containers:
        terminated = pod.start(name).wait()
        assert terminated.exit_code == 0, terminated.log
    pods.remove()
    return job


@pytest.fixture
def in_image(image: str) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Function that runs a program in the image, by default its entry point."""

    def run(*arguments: str, program: str | None = None) -> "subprocess.CompletedProcess[str]":
        entrypoint = ["--entrypoint", program] if program else []
        return run_podman(
            "run", "--rm", *LIMITS, "--read-only", "--read-only-tmpfs=false", *entrypoint, image, *arguments
        )

    return run
