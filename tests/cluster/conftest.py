"""Fixtures for tests on a real cluster: a namespace, storage that pods can reach, tiny jobs, and the `topwork` command.

These tests run only with `-m cluster`. `environment.py` reads all settings.
"""

import os
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from tests.cluster import environment
from tests.cluster.commands import Topwork
from tests.cluster.controller import DEFINITION_FILE, DEFINITIONS, Controller, kustomize_objects
from tests.cluster.diagnostics import collect_diagnostics
from tests.cluster.kubectl import Kubectl, wait_for
from tests.cluster.manifests import base_objects, probe, storage_secret, tiny_spec
from tests.cluster.runs import Run
from tests.cluster.storage import ClusterStorage, configured_storage, serve_storage
from tests.cluster.transfer_jobs import TransferJobRun

from topwork.clients.kubernetes import KubernetesObject
from topwork.spec import TransferJob

NAMESPACES_KEY = pytest.StashKey[list[str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add diagnostics of the cluster to the report of a failed test, before cleanup."""
    report = yield
    if report.failed and report.when != "teardown":
        for namespace in item.config.stash.get(NAMESPACES_KEY, []):
            if diagnostics := collect_diagnostics(namespace):
                report.sections.append((f"namespace {namespace}", diagnostics))
    return report


@pytest.fixture(scope="session")
def cluster(pytestconfig: pytest.Config) -> Iterator[Kubectl]:
    """kubectl for the cluster, in the default namespace."""
    if not environment.has_cluster():
        pytest.skip(environment.SKIP_REASON)
    pytestconfig.stash[NAMESPACES_KEY] = []
    with pytest.MonkeyPatch.context() as patch:
        if files := os.environ.get("KUBECONFIG"):
            # Commands run in other working directories.
            absolute = [str(Path(file).absolute()) for file in files.split(os.pathsep) if file]
            patch.setenv("KUBECONFIG", os.pathsep.join(absolute))
        kubectl = Kubectl()
        kubectl("version", seconds=60)
        yield kubectl


@pytest.fixture(scope="session")
def pod_storage(cluster: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterStorage]:
    """Storage that both pods and this machine can reach."""
    if bucket := os.environ.get("TOPWORK_TEST_BUCKET"):
        yield configured_storage(bucket)
        return
    host = environment.reachable_address(cluster.config()["clusters"][0]["cluster"]["server"])
    with serve_storage(tmp_path_factory.mktemp("s3"), host) as storage:
        yield storage


@pytest.fixture(scope="session")
def make_namespace(cluster: Kubectl, pytestconfig: pytest.Config) -> Iterator[Callable[..., Kubectl]]:
    """Function that creates namespaces from k8s/base with unique names; all are deleted after the last test."""
    created: list[str] = []

    def make(secret: ClusterStorage | None = None, **variables: str) -> Kubectl:
        kubectl = Kubectl(f"topwork-test-{uuid.uuid4().hex[:8]}")
        created.append(kubectl.namespace)
        pytestconfig.stash[NAMESPACES_KEY].append(kubectl.namespace)
        user_provided = {"Secret", "ResourceQuota"}
        kubectl.apply(*(obj for obj in base_objects(kubectl.namespace) if obj["kind"] not in user_provided))
        # Pods are rejected until the controller has created their ServiceAccount.
        wait_for(lambda: kubectl.get("serviceaccount", "default"), "ServiceAccount default", seconds=60)
        if secret:
            kubectl.apply(storage_secret({**secret.variables, **variables}))
        return kubectl

    yield make
    for namespace in created:
        cluster("delete", "namespace", namespace, "--ignore-not-found", "--wait=false")
    for namespace in created:
        cluster("wait", "--for=delete", f"namespace/{namespace}", "--timeout=300s", seconds=330, check=False)


@pytest.fixture(scope="session")
def namespace(make_namespace: Callable[..., Kubectl], pod_storage: ClusterStorage) -> Kubectl:
    """kubectl in a new namespace with the Secret, after a pod has connected to the storage."""
    kubectl = make_namespace(pod_storage)
    host, port = pod_storage.address
    kubectl.apply(probe(host, port))

    def finished_pod() -> KubernetesObject | None:
        pod = kubectl.get("pod", "probe")
        statuses = pod["status"].get("containerStatuses", []) if pod else []
        reasons = [status["state"].get("waiting", {}).get("reason", "") for status in statuses]
        if failed := [reason for reason in reasons if "Image" in reason]:
            pytest.fail(
                f"The nodes can't get the image {environment.image()} ({failed[0]}): load it (kind load "
                "docker-image, ctr -n k8s.io images import), or set TOPWORK_IMAGE to one that they can pull."
            )
        return pod if pod and pod["status"].get("phase") in {"Succeeded", "Failed"} else None

    pod = wait_for(finished_pod, "end of the pod that connects to the storage", seconds=environment.START_SECONDS)
    if pod["status"]["phase"] == "Failed":
        pytest.fail(
            f"Pods can't connect to the storage: {kubectl('logs', 'probe', check=False).strip()}. Set "
            "TOPWORK_TEST_HOST to an address of this machine that they can reach, or TOPWORK_TEST_BUCKET and the AWS "
            "variables."
        )
    kubectl("delete", "pod", "probe", "--wait=false")
    return kubectl


@pytest.fixture(scope="session")
def definition(cluster: Kubectl) -> Iterator[None]:
    """The CustomResourceDefinitions of this version; those that are new in the cluster are deleted at the end."""
    new = [name for name in DEFINITIONS if cluster.get("customresourcedefinition", name) is None]
    cluster("apply", "--server-side", "--force-conflicts", "--filename", str(DEFINITION_FILE))
    for name in DEFINITIONS:
        cluster("wait", "--for=condition=Established", f"customresourcedefinition/{name}", "--timeout=60s")
    yield
    for name in new:
        cluster("delete", "customresourcedefinition", name, "--timeout=120s", seconds=150, check=False)


@pytest.fixture(scope="session")
def controller(definition: None, namespace: Kubectl) -> Controller:
    """The controller of the namespace of the session, from k8s/controller."""
    controller = Controller(namespace)
    controller.install(kustomize_objects(namespace.namespace))
    return controller


@pytest.fixture(scope="module")
def topwork(namespace: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topwork]:
    """The `topwork` command with the namespace and image of the session."""
    command = Topwork(namespace.namespace, tmp_path_factory.mktemp("commands"), {"TOPWORK_IMAGE": environment.image()})
    yield command
    command.stop_all()


@pytest.fixture(scope="session")
def images_uri(pod_storage: ClusterStorage, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of an image folder in storage: two classes with 20 images each, which differ in color."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    directory = tmp_path_factory.mktemp("images")
    storage = pod_storage.at(f"topwork-{uuid.uuid4().hex[:12]}/images")
    for channel, name in ((2, "blue"), (0, "red")):
        for index in range(20):
            pixels = random.integers(0, 120, (40, 36, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            file = directory / f"{name}-{index:02}.png"
            Image.fromarray(pixels).save(file)
            storage.write(f"{name}/{index:02}.png", file.read_bytes())
    return storage.uri


MakeRun = Callable[..., Run]


def _run_factory(
    kubectl: Kubectl,
    images_uri: str,
    storage: ClusterStorage,
    directory: Path,
    created: list[Run],
    kind: type[Run] = Run,
    **defaults: Any,
) -> MakeRun:
    def make(name: str | None = None, namespace: Kubectl | None = None, compute: Any = None, **spec: Any) -> Run:
        """Write the spec of a tiny job; `compute` sets keys of `spec.compute`, other arguments set keys of `spec`."""
        # A separate storage prefix makes the run unique, and prevents reuse of datasets that other tests pulled.
        address = storage.at(f"topwork-{uuid.uuid4().hex[:12]}").uri
        content = tiny_spec(name or f"t-{uuid.uuid4().hex[:8]}", address, images_uri)
        content["spec"] |= spec
        content["spec"]["compute"] |= defaults | (compute or {})
        file = directory / f"{uuid.uuid4().hex[:8]}.yaml"
        with file.open("w") as stream:
            YAML().dump(content, stream)
        created.append(kind(namespace or kubectl, TransferJob.model_validate(content), file))
        return created[-1]

    return make


@pytest.fixture
def make_run(namespace: Kubectl, images_uri: str, pod_storage: ClusterStorage, tmp_path: Path) -> Iterator[MakeRun]:
    """Function that creates runs, whose objects are deleted after the test."""
    created: list[Run] = []
    yield _run_factory(namespace, images_uri, pod_storage, tmp_path, created)
    for run in created:
        run.delete()


@pytest.fixture(scope="module")
def make_shared_run(
    namespace: Kubectl, images_uri: str, pod_storage: ClusterStorage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeRun]:
    """Like `make_run`, for runs that are shared by the tests of a module."""
    created: list[Run] = []
    yield _run_factory(namespace, images_uri, pod_storage, tmp_path_factory.mktemp("jobs"), created)
    for run in created:
        run.delete()


@pytest.fixture
def make_transfer_job(
    controller: Controller, images_uri: str, pod_storage: ClusterStorage, tmp_path: Path
) -> Iterator[Callable[..., TransferJobRun]]:
    """Function that creates TransferJobs in the namespace of the controller; they are deleted after the test."""
    created: list[Run] = []
    yield _run_factory(
        controller.kubectl, images_uri, pod_storage, tmp_path, created, TransferJobRun, image=environment.image()
    )
    for run in created:
        run.delete()


@pytest.fixture(scope="module")
def make_shared_transfer_job(
    controller: Controller, images_uri: str, pod_storage: ClusterStorage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., TransferJobRun]]:
    """Like `make_transfer_job`, for TransferJobs that are shared by the tests of a module."""
    created: list[Run] = []
    directory = tmp_path_factory.mktemp("transfer_jobs")
    yield _run_factory(
        controller.kubectl, images_uri, pod_storage, directory, created, TransferJobRun, image=environment.image()
    )
    for run in created:
        run.delete()
