"""A namespace of a real cluster, storage that its pods reach, tiny jobs for it, and the command `topwork`.

Nothing here runs unless `-m cluster` asks for it. `surroundings.py` reads all that can be set.
"""

import os
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from tests.cluster import surroundings
from tests.cluster.commands import Topwork
from tests.cluster.kubectl import Kubectl, eventually
from tests.cluster.manifests import base_objects, probe, spec_of, storage_secret
from tests.cluster.runs import Run
from tests.cluster.storage import ClusterStorage, own_storage, served_storage
from tests.cluster.telling import account

from topwork.clients.kubernetes import KubernetesObject
from topwork.spec import TransferJob

Namespaces = pytest.StashKey[list[str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a test that failed what the cluster looks like, while all is still there."""
    report = yield
    if report.failed and report.when != "teardown":
        for namespace in item.config.stash.get(Namespaces, []):
            if told := account(namespace):
                report.sections.append((f"namespace {namespace}", told))
    return report


@pytest.fixture(scope="session")
def cluster(pytestconfig: pytest.Config) -> Iterator[Kubectl]:
    """kubectl against the cluster, in whatever namespace."""
    if not surroundings.has_cluster():
        pytest.skip(surroundings.NO_CLUSTER)
    pytestconfig.stash[Namespaces] = []
    with pytest.MonkeyPatch.context() as patch:
        if files := os.environ.get("KUBECONFIG"):
            # The commands are called in folders of their own.
            absolute = [str(Path(file).absolute()) for file in files.split(os.pathsep) if file]
            patch.setenv("KUBECONFIG", os.pathsep.join(absolute))
        kubectl = Kubectl()
        kubectl("version", seconds=60)
        yield kubectl


@pytest.fixture(scope="session")
def storage_of_pods(cluster: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterStorage]:
    """Storage that the pods and this machine both reach."""
    if bucket := os.environ.get("TOPWORK_TEST_BUCKET"):
        yield own_storage(bucket)
        return
    host = surroundings.host(cluster.config()["clusters"][0]["cluster"]["server"])
    with served_storage(tmp_path_factory.mktemp("s3"), host) as storage:
        yield storage


@pytest.fixture(scope="session")
def make_namespace(cluster: Kubectl, pytestconfig: pytest.Config) -> Iterator[Callable[..., Kubectl]]:
    """Make a namespace from k8s/base, under another name; all are removed at the end of the session."""
    made: list[str] = []

    def make(secret: ClusterStorage | None = None, **variables: str) -> Kubectl:
        kubectl = Kubectl(f"topwork-test-{uuid.uuid4().hex[:8]}")
        made.append(kubectl.namespace)
        pytestconfig.stash[Namespaces].append(kubectl.namespace)
        filled_in_by_users = {"Secret", "ResourceQuota"}
        kubectl.apply(*(each for each in base_objects(kubectl.namespace) if each["kind"] not in filled_in_by_users))
        # Pods are refused until the controller has made the account that they run as.
        eventually(lambda: kubectl.get("serviceaccount", "default"), "the account default", seconds=60)
        if secret:
            kubectl.apply(storage_secret({**secret.variables, **variables}))
        return kubectl

    yield make
    for namespace in made:
        cluster("delete", "namespace", namespace, "--ignore-not-found", "--wait=false")
    for namespace in made:
        cluster("wait", "--for=delete", f"namespace/{namespace}", "--timeout=300s", seconds=330, check=False)


@pytest.fixture(scope="session")
def namespace(make_namespace: Callable[..., Kubectl], storage_of_pods: ClusterStorage) -> Kubectl:
    """kubectl in a fresh namespace with the Secret, once a pod there has reached the storage."""
    kubectl = make_namespace(storage_of_pods)
    host, port = storage_of_pods.address
    kubectl.apply(probe(host, port))

    def ended() -> KubernetesObject | None:
        pod = kubectl.get("pod", "probe")
        statuses = pod["status"].get("containerStatuses", []) if pod else []
        reasons = [each["state"].get("waiting", {}).get("reason", "") for each in statuses]
        if failed := [reason for reason in reasons if "Image" in reason]:
            pytest.fail(
                f"The nodes can't get the image {surroundings.image()} ({failed[0]}): load it (kind load "
                "docker-image, ctr -n k8s.io images import), or set TOPWORK_IMAGE to one that they can pull."
            )
        return pod if pod and pod["status"].get("phase") in {"Succeeded", "Failed"} else None

    pod = eventually(ended, "the end of the pod that tries to reach the storage", seconds=surroundings.START_SECONDS)
    if pod["status"]["phase"] == "Failed":
        pytest.fail(
            f"Pods can't reach the storage: {kubectl('logs', 'probe', check=False).strip()}. Set TOPWORK_TEST_HOST "
            "to an address of this machine that they can reach, or TOPWORK_TEST_BUCKET and the AWS variables."
        )
    kubectl("delete", "pod", "probe", "--wait=false")
    return kubectl


@pytest.fixture(scope="module")
def topwork(namespace: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topwork]:
    """The command, in the namespace and with the image of the session."""
    called = Topwork(namespace.namespace, tmp_path_factory.mktemp("called"), {"TOPWORK_IMAGE": surroundings.image()})
    yield called
    called.stop_all()


@pytest.fixture(scope="session")
def photos(storage_of_pods: ClusterStorage, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a folder of images in storage: two classes of 20, told apart by their colour."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photos")
    storage = storage_of_pods.at(f"topwork-{uuid.uuid4().hex[:12]}/photos")
    for channel, name in ((2, "blue"), (0, "red")):
        for index in range(20):
            pixels = random.integers(0, 120, (40, 36, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            file = folder / f"{name}-{index:02}.png"
            Image.fromarray(pixels).save(file)
            storage.write(f"{name}/{index:02}.png", file.read_bytes())
    return storage.uri


MakeRun = Callable[..., Run]


def _maker(kubectl: Kubectl, photos: str, storage: ClusterStorage, folder: Path, made: list[Run]) -> MakeRun:
    def make(name: str | None = None, where: Kubectl | None = None, compute: Any = None, **spec: Any) -> Run:
        """Write the spec of a tiny job; keyword arguments replace keys of `spec`, and `compute` keys of compute."""
        # A storage of its own makes the run another one, and nothing is found that another test pulled.
        address = storage.at(f"topwork-{uuid.uuid4().hex[:12]}").uri
        content = spec_of(name or f"t-{uuid.uuid4().hex[:8]}", address, photos)
        content["spec"] |= spec
        content["spec"]["compute"] |= compute or {}
        file = folder / f"{uuid.uuid4().hex[:8]}.yaml"
        with file.open("w") as opened:
            YAML().dump(content, opened)
        made.append(Run(where or kubectl, TransferJob.model_validate(content), file))
        return made[-1]

    return make


@pytest.fixture
def make_run(namespace: Kubectl, photos: str, storage_of_pods: ClusterStorage, tmp_path: Path) -> Iterator[MakeRun]:
    """Write the specs of runs; what is left of them in the cluster is removed after the test."""
    made: list[Run] = []
    yield _maker(namespace, photos, storage_of_pods, tmp_path, made)
    for run in made:
        run.remove()


@pytest.fixture(scope="module")
def make_shared_run(
    namespace: Kubectl, photos: str, storage_of_pods: ClusterStorage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeRun]:
    """As `make_run`, for runs that the tests of a module share."""
    made: list[Run] = []
    yield _maker(namespace, photos, storage_of_pods, tmp_path_factory.mktemp("jobs"), made)
    for run in made:
        run.remove()
