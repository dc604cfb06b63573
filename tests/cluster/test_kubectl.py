"""Using kubectl without topwork, and how the API server handles rendered objects."""

import pytest
from tests.cluster.environment import RUN_SECONDS
from tests.cluster.manifests import ROOT, base_objects, with_namespace

from topwork.cluster.names import RUN_LABEL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * RUN_SECONDS)]

K8S = ROOT / "k8s"
EXAMPLES = [path for path in sorted((K8S / "examples").glob("*.yaml")) if path.name != "kustomization.yaml"]
OVERLAYS = sorted(path.parent for path in (K8S / "overlays").glob("*/kustomization.yaml"))
TEMPLATES = sorted((K8S / "base").glob("*.example"))


@pytest.mark.smoke
def test_rendered_objects_train_after_kubectl_apply(make_run, topwork, namespace):
    run = make_run()
    rendered = topwork("render", run.file)
    assert rendered.exit_code == 0, rendered.output
    namespace("apply", "-f", "-", stdin=rendered.stdout)
    timeout = f"--timeout={RUN_SECONDS:.0f}s"
    namespace("wait", "--for=condition=Complete", f"job/{run.object_name}", timeout, seconds=RUN_SECONDS + 30)
    termination_messages = run.termination_messages(run.pods()[-1])
    assert termination_messages["fine-tune"].model == f"{run.job.spec.storage}/models/{run.name}/1"
    # topwork finds objects that kubectl applied.
    status = topwork("status", run.name)
    assert status.exit_code == 0, status.output
    assert termination_messages["fine-tune"].model in status.output


@pytest.mark.smoke
def test_server_dry_run_creates_nothing(make_run, topwork):
    run = make_run()
    dry_run = topwork("submit", run.file, "--dry-run=server")
    assert dry_run.exit_code == 0, dry_run.output
    assert run.kubernetes_job() is None


def test_server_accepts_k8s_base(namespace):
    objects = base_objects(namespace.namespace)
    applied = namespace.apply(*objects, options=("--dry-run=server", "--validate=strict"))
    assert len(applied.splitlines()) == len(objects)


@pytest.mark.parametrize("path", [*TEMPLATES, *EXAMPLES], ids=lambda path: path.stem)
def test_server_accepts_every_example_and_template(path, namespace):
    objects = with_namespace(path.read_text(), namespace.namespace)
    applied = namespace.apply(*objects, options=("--dry-run=server", "--validate=strict"))
    assert len(applied.splitlines()) == len(objects)


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.name)
def test_server_accepts_every_overlay(path, namespace):
    objects = with_namespace(namespace("kustomize", str(path)), namespace.namespace)
    applied = namespace.apply(*objects, options=("--dry-run=server", "--validate=strict"))
    assert len(applied.splitlines()) == len(objects)


def test_longest_job_name_creates_pods(make_run, topwork):
    run = make_run(name="n" + 38 * "a" + "e", compute={"prefetch": True})
    submitted = topwork("submit", run.file)
    assert submitted.exit_code == 0, submitted.output
    pod = run.wait_for_pod()
    assert len(run.name) == 40
    labels = run.kubectl.get("pod", pod)["metadata"]["labels"]
    assert labels[RUN_LABEL] == run.object_name
    assert topwork("status", run.name).exit_code == 0


def test_finished_job_and_config_map_are_deleted_after_the_ttl(make_run, topwork):
    run = make_run(compute={"ttlSecondsAfterFinished": 5})
    result = topwork("submit", run.file, "--follow")
    assert result.exit_code == 0, result.output
    run.wait_until_deleted()
