"""The controller as an administrator installs it: definition, permissions, webhook, restarts and deleted namespaces."""

import random
import time
from collections.abc import Callable, Iterator

import pytest
from tests.cluster.commands import Topwork
from tests.cluster.controller import (
    DEFINITIONS,
    PERMISSIONS,
    Controller,
    access_rules,
    chart_objects,
    definition_object,
    expand_rules,
    kustomize_objects,
)
from tests.cluster.environment import EVENT_SECONDS, RUN_SECONDS
from tests.cluster.kubectl import Kubectl, KubectlError, wait_for
from tests.cluster.manifests import RULE_ERRORS, break_rules
from tests.cluster.transfer_jobs import LONG_TRAINING, TransferJobRun

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import RUN_LABEL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(4 * RUN_SECONDS)]

KILLS = 20
# Several minutes: about as long as the kills.
SLOW_TRAINING = LONG_TRAINING | {"epochs": 5_000}


@pytest.fixture
def install_chart(definition: None) -> Iterator[Callable[..., Controller]]:
    """Function that installs the controller from the chart; its cluster-wide objects are deleted after the test."""
    cluster_wide: list[tuple[str, str]] = []

    def install(kubectl: Kubectl, **values) -> Controller:
        objects = chart_objects(kubectl.namespace, **values)
        cluster_wide.extend(
            (obj["kind"], obj["metadata"]["name"]) for obj in objects if "namespace" not in obj["metadata"]
        )
        controller = Controller(kubectl)
        controller.install(objects)
        return controller

    yield install
    for kind, name in cluster_wide:
        Kubectl()("delete", kind, name, "--ignore-not-found", check=False)


@pytest.fixture
def define(definition: None, cluster: Kubectl) -> Iterator[Callable[[KubernetesObject], None]]:
    """Function that applies another version of the definition, which is restored after the test."""

    def apply(obj: KubernetesObject) -> None:
        cluster.apply(obj, options=("--server-side", "--force-conflicts"))

    yield apply
    apply(definition_object())


@pytest.mark.smoke
@pytest.mark.parametrize("name", DEFINITIONS)
def test_definition_is_established_and_structural(definition: None, cluster: Kubectl, name: str):
    # Rules whose estimated cost exceeds the budget are rejected, too.
    options = ("--server-side", "--force-conflicts", "--dry-run=server", "--warnings-as-errors", "--validate=strict")
    cluster.apply(definition_object(name), options=options)
    stored = cluster.get("customresourcedefinition", name)
    conditions = {condition["type"]: condition["status"] for condition in stored["status"]["conditions"]}
    assert conditions.get("NonStructuralSchema", "False") == "False"
    assert (conditions["Established"], conditions["NamesAccepted"]) == ("True", "True")
    assert stored["status"]["storedVersions"] == ["v1alpha1"]


def test_kubectl_explain_describes_the_spec(definition: None, cluster: Kubectl):
    explained = wait_for(
        lambda: cluster("explain", "tj.spec.fineTune", check=False), "schema of TransferJob", seconds=EVENT_SECONDS
    )
    assert "unfreeze" in explained
    assert "<no description>" not in explained


@pytest.mark.parametrize("objects", [kustomize_objects, chart_objects], ids=["kustomize", "chart"])
def test_server_accepts_the_objects_of_the_controller(definition: None, namespace: Kubectl, objects):
    applied = namespace.apply(*objects(namespace.namespace), options=("--dry-run=server", "--validate=strict"))
    assert "deployment.apps/topwork-controller" in applied


@pytest.mark.smoke
def test_service_account_has_the_documented_permissions_only(controller: Controller, cluster: Kubectl):
    everyone = f"system:serviceaccount:{controller.kubectl.namespace}:default"
    own = access_rules(controller.kubectl, controller.account) - access_rules(controller.kubectl, everyone)
    assert own == expand_rules(PERMISSIONS)
    # In other namespaces, and for cluster-wide objects, it may do what everyone may.
    assert access_rules(cluster, controller.account) == access_rules(cluster, everyone)


def test_controller_from_the_chart_has_the_same_permissions_in_each_of_its_namespaces(install_chart, make_namespace):
    other = make_namespace()
    controller = install_chart(make_namespace(), namespaces=[other.namespace])
    everyone = f"system:serviceaccount:{controller.kubectl.namespace}:default"
    permissions = expand_rules(PERMISSIONS)
    for kubectl in (controller.kubectl, other):
        own = access_rules(kubectl, controller.account) - access_rules(kubectl, everyone)
        leases = {rule for rule in permissions if rule[1] == "leases"} if kubectl is other else set()
        assert own == permissions - leases


def test_controller_killed_20_times_during_a_run_starts_one_job(make_transfer_job, controller: Controller):
    run: TransferJobRun = make_transfer_job(transfer=SLOW_TRAINING)
    moments = random.Random(0)
    with run.kubectl.watch("job", f"--selector={RUN_LABEL}={run.object_name}") as jobs:
        run.apply()
        for kill in range(KILLS):
            if kill % 2:
                # The others are killed while they start, or wait for the Lease.
                controller.wait_for_leader()
            time.sleep(moments.uniform(0, 3))
            controller.kill()
        controller.wait_for_leader()
        status = run.wait_for_state("Complete", seconds=2 * RUN_SECONDS)
        assert len({event["object"]["metadata"]["uid"] for event in jobs()}) == 1
    assert (status.attempts, status.failures, len(run.pods())) == (1, 0, 1)
    assert status.model == f"{run.job.spec.storage}/models/{run.name}/1"
    events = [(event["reason"], event["message"]) for event in run.events()]
    assert len(events) == len(set(events))
    assert [reason for reason, _ in events].count("Completed") == 1


def test_deleted_namespace_does_not_stop_the_controller(install_chart, make_namespace, make_transfer_job, pod_storage):
    home, doomed = make_namespace(pod_storage), make_namespace(pod_storage)
    controller = install_chart(home, namespaces=[doomed.namespace])
    run: TransferJobRun = make_transfer_job(namespace=doomed, transfer=LONG_TRAINING)
    run.apply()
    run.wait_for_epochs(run.wait_for_pod())
    before = controller.wait_for_leader()
    doomed("delete", "namespace", doomed.namespace, "--wait=false")
    wait_for(lambda: not doomed.get("namespace", doomed.namespace), "deletion of the namespace", seconds=RUN_SECONDS)
    other: TransferJobRun = make_transfer_job(namespace=home, suspend=True)
    other.apply()
    other.wait_for_state("Suspended", seconds=EVENT_SECONDS)
    (pod,) = controller.pods()
    restarts = [status["restartCount"] for status in pod["status"]["containerStatuses"]]
    assert (pod["metadata"]["name"], restarts) == (before, [0])


def test_upgraded_definition_keeps_objects_and_runs(
    make_transfer_job, controller: Controller, define, cluster: Kubectl
):
    run: TransferJobRun = make_transfer_job(transfer=LONG_TRAINING)
    run.apply()
    epochs = run.wait_for_epochs(run.wait_for_pod())
    before, uid = run.transfer_job(), run.job_uid()
    changed = definition_object()
    (version,) = changed["spec"]["versions"]
    description = "A description of the next version."
    version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["seed"]["description"] = description
    define(changed)
    wait_for(
        lambda: description in cluster("explain", "tj.spec.seed", check=False),
        "description of the next version",
        seconds=EVENT_SECONDS,
    )
    after = run.transfer_job()
    for key in ("uid", "generation"):
        assert after["metadata"][key] == before["metadata"][key]
    assert after["spec"] == before["spec"]
    # Both the run and the controller go on.
    run.patch(suspend=True)
    run.wait_for_state("Suspended", seconds=EVENT_SECONDS)
    run.wait_until_stopped()
    run.patch(suspend=False)
    assert run.wait_for_epochs(run.wait_for_pod())[0] > epochs[-1]
    assert run.job_uid() != uid


def apply_result(run: TransferJobRun) -> str:
    """Return the error of a dry run of `kubectl apply`; empty if the API server accepts the object."""
    try:
        run.apply("--dry-run=server")
    except KubectlError as error:
        return str(error)
    return ""


def test_webhook_reports_every_error_at_kubectl_apply_and_is_optional(
    install_chart, make_namespace, make_transfer_job, topwork: Topwork
):
    kubectl = make_namespace()
    install_chart(kubectl, webhook={"enabled": True})
    run: TransferJobRun = make_transfer_job(namespace=kubectl)
    assert apply_result(run) == ""
    run.edit(break_rules)
    # The controller creates its certificate, and the API server reads the configuration, in the background.
    rejection = wait_for(lambda: apply_result(run), "a rejection by the webhook", seconds=EVENT_SECONDS)
    assert "validate.transferjobs.topwork.dev" in rejection
    validated = topwork.run_locally("validate", run.file)
    assert validated.exit_code == 2, validated.output
    for error in RULE_ERRORS:
        assert error in rejection
        assert error in validated.output
    # Without a controller, the webhook does not block anyone.
    kubectl("scale", "deployment/topwork-controller", "--replicas=0")
    wait_for(lambda: apply_result(run) == "", "acceptance without the webhook", seconds=EVENT_SECONDS)
