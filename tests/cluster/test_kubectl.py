"""What a person does who has kubectl alone, and what Kubernetes makes of our objects."""

import pytest
from tests.cluster.environment import RUN_SECONDS
from tests.cluster.manifests import ROOT, base_objects, with_namespace

from topwork.cluster.names import RUN_LABEL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * RUN_SECONDS)]

K8S = ROOT / "k8s"
EXAMPLES = [path for path in sorted((K8S / "examples").glob("*.yaml")) if path.name != "kustomization.yaml"]
OVERLAYS = sorted(path.parent for path in (K8S / "overlays").glob("*/kustomization.yaml"))
TEMPLATES = sorted((K8S / "base").glob("*.example"))


def test_rendered_objects_train_when_kubectl_applies_them(make_run, topwork, namespace):
    run = make_run()
    rendered = topwork("render", run.file)
    assert rendered.exit_code == 0, rendered.output
    namespace("apply", "-f", "-", stdin=rendered.stdout)
    timeout = f"--timeout={RUN_SECONDS:.0f}s"
    namespace("wait", "--for=condition=Complete", f"job/{run.object_name}", timeout, seconds=RUN_SECONDS + 30)
    termination_messages = run.termination_messages(run.pods()[-1])
    assert termination_messages["fine-tune"].model == f"{run.job.spec.storage}/models/{run.name}/1"
    # topwork finds what kubectl has created.
    status = topwork("status", run.name)
    assert status.exit_code == 0, status.output
    assert termination_messages["fine-tune"].model in status.output


def test_the_server_takes_what_it_is_only_asked_about(make_run, topwork):
    run = make_run()
    asked = topwork("submit", run.file, "--dry-run=server")
    assert asked.exit_code == 0, asked.output
    assert run.kubernetes_job() is None


def test_the_server_takes_all_of_k8s_base(namespace):
    objects = base_objects(namespace.namespace)
    applied = namespace.apply(*objects, options=("--dry-run=server", "--validate=strict"))
    assert len(applied.splitlines()) == len(objects)


@pytest.mark.parametrize("path", [*TEMPLATES, *EXAMPLES], ids=lambda path: path.stem)
def test_the_server_takes_every_manifest(path, namespace):
    objects = with_namespace(path.read_text(), namespace.namespace)
    applied = namespace.apply(*objects, options=("--dry-run=server", "--validate=strict"))
    assert len(applied.splitlines()) == len(objects)


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.name)
def test_the_server_takes_every_overlay(path, namespace):
    objects = with_namespace(namespace("kustomize", str(path)), namespace.namespace)
    applied = namespace.apply(*objects, options=("--dry-run=server", "--validate=strict"))
    assert len(applied.splitlines()) == len(objects)


def test_the_longest_name_makes_pods_of_its_own(make_run, topwork):
    run = make_run(name="n" + 38 * "a" + "e", compute={"prefetch": True})
    submitted = topwork("submit", run.file)
    assert submitted.exit_code == 0, submitted.output
    pod = run.wait_for_pod()
    assert len(run.name) == 40
    found = run.kubectl.get("pod", pod)
    assert found["metadata"]["labels"][RUN_LABEL] == run.object_name
    assert topwork("status", run.name).exit_code == 0


def test_a_finished_job_goes_with_its_config_map_after_its_time(make_run, topwork):
    run = make_run(compute={"ttlSecondsAfterFinished": 5})
    ended = topwork("submit", run.file, "--follow")
    assert ended.exit_code == 0, ended.output
    run.wait_until_deleted()
