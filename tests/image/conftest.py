"""The image, built once; pods of rendered Jobs, with a real S3 server; and the examples with their pictures."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.image.engine import LIMITS, MISSING, is_missing, podman
from tests.image.pod import Namespace, Pod

from topwork.clients.s3.storage import Storage, StorageSettings, create_bucket
from topwork.cluster.manifests.render import RenderedObjects, RenderOptions, render
from topwork.cluster.names import STORAGE_SECRET
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_jobs

# Docker's registry, debootstrap, TensorFlow's download and 2 GB to write: on a slow machine all of that takes a while.
BUILD_SECONDS = 1500
# The bundle of certificates that this machine trusts, for networks with an authority of their own.
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")


@pytest.fixture(scope="session")
def image() -> str:
    """Name of the image for processors, built from this tree; what the engine has built before is taken from there."""
    if is_missing():
        if os.environ.get("CI") == "true":
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    job = example("solar-transfer")
    name = str(render(job, RenderOptions()).training["spec"]["template"]["spec"]["containers"][0]["image"])
    base = next(line for line in Path("Dockerfile").read_text().splitlines() if line.startswith("ARG BASE="))
    built("tests/image/base.sh", base.removeprefix("ARG BASE="))
    authorities = [f"CA={AUTHORITIES}"] if AUTHORITIES.exists() else []
    built("make", "image", "BUILDER=podman", "ACCELERATOR=cpu", f"IMAGE={name}", *authorities)
    return name


def built(*command: str) -> None:
    """Run a command of the build. `chroot` needs no right to start containers for the steps of a build."""
    ended = subprocess.run(
        command,
        env=os.environ | {"BUILDAH_ISOLATION": "chroot"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout


def example(name: str, **spec: Any) -> TransferJob:
    """Read an example; keyword arguments replace whole keys of its spec."""
    (job,) = read_jobs(Path("examples") / f"{name}.yaml")
    content = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return TransferJob.model_validate(content | {"spec": content["spec"] | spec})


@pytest.fixture(scope="session")
def secret(s3_settings: StorageSettings) -> dict[str, str]:
    """What the Secret of the storage holds."""
    return {
        "AWS_ENDPOINT_URL": s3_settings.endpoint_url or "",
        "AWS_ACCESS_KEY_ID": s3_settings.access_key or "",
        "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key or "",
        "AWS_REGION": s3_settings.region or "us-east-1",
    }


@pytest.fixture(scope="session")
def solar(s3_settings: StorageSettings, secret: dict[str, str]) -> Storage:
    """Storage of the solar examples, with their pictures."""
    address = example("solar-transfer").spec.storage
    create_bucket(s3_settings, address.removeprefix("s3://").split("/")[0])
    subprocess.run([sys.executable, "examples/solar/pictures.py", address], env=os.environ | secret, check=True)
    return Storage(address, s3_settings)


class Namespaced:
    """Pods of rendered Jobs in one namespace; all that they started is taken away at the end."""

    def __init__(self, folder: Path, secret: dict[str, str]) -> None:
        self._folder = folder
        self._secret = secret
        self._pods: list[Pod] = []

    def __call__(self, job: TransferJob, secret: dict[str, str] | None = None) -> Pod:
        """Make the pod of a job; `secret` replaces what the storage's Secret holds, and an empty one takes it away."""
        rendered: RenderedObjects = render(job, RenderOptions())
        config_map = rendered.config_map
        secret = self._secret if secret is None else secret
        namespace = Namespace(
            config_maps={config_map["metadata"]["name"]: config_map["data"]},
            secrets={STORAGE_SECRET: secret} if secret else {},
        )
        self._pods.append(Pod(rendered.training["spec"]["template"], namespace, self._folder))
        return self._pods[-1]

    def remove(self) -> None:
        """Take away every container that is still there."""
        for pod in self._pods:
            pod.remove()


@pytest.fixture
def make_pod(image: str, secret: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Pod]]:
    """Make pods of jobs, as the Job controller would."""
    pods = Namespaced(tmp_path, secret)
    yield pods
    pods.remove()


@pytest.fixture(scope="session")
def solar_base(
    image: str, secret: dict[str, str], solar: Storage, tmp_path_factory: pytest.TempPathFactory
) -> TransferJob:
    """The job whose model the transfer example starts from: run from the image to its end."""
    job = example("solar-base")
    pods = Namespaced(tmp_path_factory.mktemp("solar-base"), secret)
    pod = pods(job)
    for name in pod.containers:
        ended = pod.start(name).wait()
        assert ended.exit_code == 0, ended.log
    pods.remove()
    return job


@pytest.fixture
def in_image(image: str) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run a program in the image, as `docker run` would; without one the image's own."""

    def call(*arguments: str, program: str | None = None) -> "subprocess.CompletedProcess[str]":
        entry = ["--entrypoint", program] if program else []
        return podman("run", "--rm", *LIMITS, "--read-only", "--read-only-tmpfs=false", *entry, image, *arguments)

    return call
