"""Permissions: the role of k8s/base is sufficient, and the error without it names the role."""

import pytest
from tests.cluster.environment import DELETION_SECONDS, RUN_SECONDS, kubeconfig_with_token
from tests.cluster.kubectl import Kubectl

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * RUN_SECONDS)]

ROLE = "topwork-submitter"
LONG_TRAINING = {"train": "all", "epochs": 10_000, "batchSize": 8, "featureCache": "off"}


def binding(name, namespace):
    """Return a RoleBinding of a service account to the role."""
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": ROLE},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
    }


@pytest.fixture
def account(namespace: Kubectl, tmp_path):
    """Function that creates a service account, with or without the role, and returns its kubeconfig."""
    created = []

    def make(name: str, *, bound: bool):
        namespace.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}})
        created.append(("serviceaccount", name))
        if bound:
            namespace.apply(binding(name, namespace.namespace))
            created.append(("rolebinding", name))
        token = namespace("create", "token", name, "--duration=1h").strip()
        path = tmp_path / f"{name}.json"
        path.write_text(kubeconfig_with_token(namespace.config(), token))
        path.chmod(0o600)
        return path

    yield make
    for kind, name in created:
        namespace("delete", kind, name, "--ignore-not-found")


def test_role_is_sufficient_to_submit_follow_and_cancel(account, make_run, topwork):
    kubeconfig = account("submitter", bound=True)
    run = make_run(transfer=LONG_TRAINING)
    submitted = topwork("submit", run.file, "--kubeconfig", kubeconfig)
    assert submitted.exit_code == 0, submitted.output
    run.wait_for_epochs(run.wait_for_pod())
    read_commands = (
        ["status", run.name],
        ["list"],
        ["logs", run.name, "--stage", "transfer"],
        ["top", run.name, "--once"],
    )
    for command in read_commands:
        result = topwork(*command, "--kubeconfig", kubeconfig)
        assert result.exit_code == 0, result.output
        assert "transfer" in result.output
    followed = topwork.start("status", run.name, "--follow", "--kubeconfig", kubeconfig)
    followed.wait_for("transfer", seconds=60)
    canceled = topwork("cancel", run.name, "--kubeconfig", kubeconfig, seconds=DELETION_SECONDS)
    assert canceled.exit_code == 0, canceled.output
    assert followed.wait(seconds=DELETION_SECONDS).exit_code == 143
    run.wait_until_deleted()


def test_error_without_the_role_names_the_role(account, make_run, topwork):
    kubeconfig = account("unprivileged", bound=False)
    run = make_run()
    rejected = topwork("submit", run.file, "--kubeconfig", kubeconfig)
    assert rejected.exit_code == 2, rejected.output
    assert ROLE in rejected.output
    assert "Traceback" not in rejected.output
    assert run.kubernetes_job() is None


def test_invalid_token_asks_to_log_in_again(namespace, make_run, topwork, tmp_path):
    kubeconfig = tmp_path / "expired.json"
    kubeconfig.write_text(kubeconfig_with_token(namespace.config(), "not-a-token"))
    rejected = topwork("submit", make_run().file, "--kubeconfig", kubeconfig)
    assert rejected.exit_code == 2, rejected.output
    assert "log in" in rejected.output.lower()
    assert "Traceback" not in rejected.output
