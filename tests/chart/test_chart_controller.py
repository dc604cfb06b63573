"""The controller in the chart: permissions, pods, webhook, definition, tests, and rendering without a cluster."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import sample_objects
import typer
from object_validation import pod_security_violations

from topwork import __version__
from topwork.cli import app
from topwork.cluster.names import pod_labels
from topwork.spec import TransferJob

CHART = Path(__file__).parents[2] / "charts" / "topwork"
Objects = dict[tuple[str, str], dict[str, Any]]
Render = Callable[..., Objects]
Rules = dict[tuple[str, str, tuple[str, ...]], set[str]]
NAME = "topwork-controller"
CONFIGURATION = "topwork-webhook.ml"

NAMESPACE_RULES = {
    ("topwork.dev", "transfersearches", ()): {"get", "list", "watch"},
    ("topwork.dev", "transferjobs", ()): {"get", "list", "watch", "create", "update", "delete"},
    ("topwork.dev", "transferjobs/status", ()): {"get", "patch"},
    ("topwork.dev", "transfersearches/status", ()): {"get", "patch"},
    ("topwork.dev", "transferjobs/finalizers", ()): {"update"},
    ("topwork.dev", "transfersearches/finalizers", ()): {"update"},
    ("batch", "jobs", ()): {"get", "list", "watch", "create", "patch", "delete"},
    ("", "configmaps", ()): {"get", "create", "update", "patch", "delete"},
    ("", "services", ()): {"get", "create", "patch", "delete"},
    ("networking.k8s.io", "networkpolicies", ()): {"get", "create", "patch", "delete"},
    ("", "pods", ()): {"get", "list", "watch"},
    ("", "events", ()): {"list", "create", "patch"},
}
TWO_NODES = sample_objects.spec(nodes=2)
LEASE_RULES = {
    ("coordination.k8s.io", "leases", ()): {"create"},
    ("coordination.k8s.io", "leases", (NAME,)): {"get", "update"},
}
WEBHOOK_RULES = {
    ("admissionregistration.k8s.io", "validatingwebhookconfigurations", (CONFIGURATION,)): {"get", "update"}
}


def controller(**values: Any) -> dict[str, Any]:
    return {"controller": values}


def webhook(certificate: str, **values: Any) -> dict[str, Any]:
    return controller(webhook={"enabled": True, "certificate": certificate}, **values)


def rules_of(role: dict[str, Any]) -> Rules:
    rules: Rules = {}
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                rules[group, resource, tuple(rule.get("resourceNames", ()))] = set(rule["verbs"])
    return rules


def granted(objects: Objects, account: str) -> dict[str, Rules]:
    """Return the rules that bindings grant to a service account, by namespace; "" for the whole cluster."""
    result: dict[str, Rules] = {}
    for (kind, _), binding in objects.items():
        if kind not in {"RoleBinding", "ClusterRoleBinding"} or account not in [s["name"] for s in binding["subjects"]]:
            continue
        (subject,) = binding["subjects"]
        assert (subject["kind"], subject["namespace"]) == ("ServiceAccount", "ml")
        namespace = binding["metadata"].get("namespace", "")
        prefix = f"{namespace}/" if namespace not in {"", "ml"} else ""
        role = objects[binding["roleRef"]["kind"], prefix + binding["roleRef"]["name"]]
        result[namespace] = result.get(namespace, {}) | rules_of(role)
    return result


def pods(objects: Objects) -> Iterator[dict[str, Any]]:
    for manifest in objects.values():
        pod = manifest.get("spec", {}).get("template", manifest if manifest["kind"] == "Pod" else {}).get("spec")
        if pod:
            yield pod


def arguments(objects: Objects) -> list[str]:
    (container,) = objects["Deployment", NAME]["spec"]["template"]["spec"]["containers"]
    return list(container["args"])


# ── Permissions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_controller_has_exactly_these_permissions_in_the_release_namespace(render_chart: Render) -> None:
    assert granted(render_chart({}), NAME) == {"ml": NAMESPACE_RULES | LEASE_RULES}


def test_controller_has_a_role_in_each_of_its_namespaces(render_chart: Render) -> None:
    objects = render_chart(controller(namespaces=["team-a", "ml", "team-b"]))
    assert granted(objects, NAME) == {
        "ml": NAMESPACE_RULES | LEASE_RULES,
        "team-a": NAMESPACE_RULES,
        "team-b": NAMESPACE_RULES,
    }
    watched = [argument for argument in arguments(objects) if "namespace" in argument]
    assert watched == ["--namespace=ml", "--namespace=team-a", "--namespace=team-b", "--lease-namespace=ml"]


def test_cluster_wide_controller_has_the_same_rules_in_a_cluster_role(render_chart: Render) -> None:
    objects = render_chart(controller(clusterWide=True))
    assert granted(objects, NAME) == {"": NAMESPACE_RULES, "ml": LEASE_RULES}
    assert "--all-namespaces" in arguments(objects)
    assert not [argument for argument in arguments(objects) if argument.startswith("--namespace")]


def test_only_the_self_signed_webhook_needs_permissions(render_chart: Render) -> None:
    namespaced = {"ml": NAMESPACE_RULES | LEASE_RULES}
    assert granted(render_chart(webhook("selfSigned")), NAME) == namespaced | {"": WEBHOOK_RULES}
    assert granted(render_chart(webhook("certManager")), NAME) == namespaced


def test_cluster_scoped_names_contain_the_namespace(render_chart: Render) -> None:
    # Releases in two namespaces are usually both called topwork.
    values = webhook("selfSigned", clusterWide=True)
    kinds = {"ClusterRole", "ClusterRoleBinding", "ValidatingWebhookConfiguration"}
    names = [
        {key for key in render_chart(values, namespace=namespace) if key[0] in kinds} for namespace in ("ml", "team-a")
    ]
    assert len(names[0]) == 9
    assert not names[0] & names[1]


@pytest.mark.parametrize(
    ("role", "verbs"),
    [
        ("view", {"get", "list", "watch"}),
        ("edit", {"create", "update", "patch", "delete", "deletecollection"}),
    ],
)
def test_cluster_wide_chart_extends_the_roles_of_kubernetes(render_chart: Render, role: str, verbs: set[str]) -> None:
    name = ("ClusterRole", f"topwork-transferjobs-{role}.ml")
    cluster_role = render_chart(controller(clusterWide=True))[name]
    assert cluster_role["metadata"]["labels"][f"rbac.authorization.k8s.io/aggregate-to-{role}"] == "true"
    kinds = ("transferjobs", "transfersearches")
    assert rules_of(cluster_role) == {("topwork.dev", kind, ()): verbs for kind in kinds}
    assert name not in render_chart({})


def test_submitters_may_manage_transfer_jobs(render_chart: Render) -> None:
    rules = rules_of(render_chart({})["Role", "topwork-submitter"])
    for kind in ("transferjobs", "transfersearches"):
        assert rules["topwork.dev", kind, ()] == {"get", "list", "watch", "create", "patch", "delete"}


def test_hook_may_only_change_the_definitions_of_topwork(render_chart: Render) -> None:
    names = ("transferjobs.topwork.dev", "transfersearches.topwork.dev")
    definitions = ("apiextensions.k8s.io", "customresourcedefinitions", names)
    assert granted(render_chart({}), "topwork-crd-upgrade") == {"": {definitions: {"create", "patch"}}}


def test_no_role_grants_access_to_secrets_or_to_everything(render_chart: Render) -> None:
    for values in ({}, webhook("selfSigned", clusterWide=True), webhook("certManager", namespaces=["a"])):
        for (kind, _), role in render_chart(values).items():
            if kind in {"Role", "ClusterRole"}:
                text = str(role["rules"])
                assert "secrets" not in text
                assert "*" not in text


# ── Pods ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pods_with_the_image_of_the_controller_are_restricted_and_use_the_same_settings(render_chart: Render) -> None:
    placement = {
        "image": "registry.example.com/topwork:1-controller",
        "imagePullSecrets": ["login"],
        "priorityClassName": "infrastructure",
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "system", "operator": "Exists"}],
    }
    found = [
        pod
        for pod in pods(render_chart(controller(**placement)))
        if pod["containers"][0]["image"] == placement["image"]
    ]
    # The controller, the hook that upgrades the definition, and the test.
    assert [pod["serviceAccountName"] for pod in found] == [NAME, "topwork-crd-upgrade", "topwork-test-submit"]
    for pod in found:
        assert list(pod_security_violations(pod)) == []
        assert pod["automountServiceAccountToken"] is True
        assert pod["imagePullSecrets"] == [{"name": "login"}]
        assert pod["priorityClassName"] == "infrastructure"
        assert pod["nodeSelector"] == {"pool": "system"}
        assert pod["tolerations"] == placement["tolerations"]
        (container,) = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["resources"]["limits"]["memory"]


def test_controller_has_probes_and_time_to_stop(render_chart: Render) -> None:
    pod = render_chart({})["Deployment", NAME]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] == 30
    assert container["image"] == f"topwork:{__version__}-controller"
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http-controller"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http-controller"}
    assert container["ports"] == [{"name": "http-controller", "containerPort": 8080, "protocol": "TCP"}]


def test_selectors_match_the_pods_of_the_controller_and_no_others(render_chart: Render) -> None:
    objects = render_chart(
        webhook("certManager", replicas=2)
        | {"networkPolicies": {"enabled": True}, "monitoring": {"podMonitor": {"enabled": True}}}
        | {"seaweedfs": {"enabled": True}}
    )
    selectors = [
        objects["Deployment", NAME]["spec"]["selector"]["matchLabels"],
        objects["Service", "topwork-webhook"]["spec"]["selector"],
        objects["PodDisruptionBudget", NAME]["spec"]["selector"]["matchLabels"],
        objects["PodMonitor", NAME]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy", NAME]["spec"]["podSelector"]["matchLabels"],
        objects["NetworkPolicy", "topwork-jobs"]["spec"]["ingress"][0]["from"][-1]["podSelector"]["matchLabels"],
    ]
    labels = {
        name: manifest["metadata"]["labels"] if kind == "Pod" else manifest["spec"]["template"]["metadata"]["labels"]
        for (kind, name), manifest in objects.items()
        if kind == "Pod" or "template" in manifest.get("spec", {})
    }
    assert len(labels) == 5
    for selector in selectors:
        assert [name for name, found in labels.items() if selector.items() <= found.items()] == [NAME]


def test_disruption_budget_exists_only_with_several_replicas(render_chart: Render) -> None:
    assert ("PodDisruptionBudget", NAME) not in render_chart({})
    assert render_chart(controller(replicas=3))["PodDisruptionBudget", NAME]["spec"]["maxUnavailable"] == 1


def test_disabled_controller_leaves_no_object_behind(render_chart: Render) -> None:
    values = webhook("selfSigned", clusterWide=True, replicas=2)
    objects = render_chart({"controller": values["controller"] | {"enabled": False}})
    assert {kind for kind, _ in objects} == {"ConfigMap", "Role", "RoleBinding", "ServiceAccount"}
    assert {name for _, name in objects} == {"topwork-defaults", "topwork-submitter", "topwork-job"}


def test_scrapes_keep_the_namespace_of_the_transfer_job(render_chart: Render) -> None:
    monitor = render_chart({"monitoring": {"podMonitor": {"enabled": True, "labels": {"release": "kps"}}}})
    (endpoint,) = monitor["PodMonitor", NAME]["spec"]["podMetricsEndpoints"]
    assert endpoint == {"port": "http-controller", "interval": "15s", "honorLabels": True}
    assert monitor["PodMonitor", NAME]["metadata"]["labels"]["release"] == "kps"


def test_network_policies_admit_the_controller_to_jobs_and_the_api_server_to_the_webhook(render_chart: Render) -> None:
    objects = render_chart(webhook("selfSigned") | {"networkPolicies": {"enabled": True, "scrapers": []}})
    (ingress,) = objects["NetworkPolicy", "topwork-jobs"]["spec"]["ingress"]
    labels = {"app.kubernetes.io/name": "topwork-controller", "app.kubernetes.io/instance": "topwork"}
    assert ingress["from"] == [{"podSelector": {"matchLabels": labels}}]
    assert objects["NetworkPolicy", NAME]["spec"]["ingress"] == [{"ports": [{"protocol": "TCP", "port": 9443}]}]


@pytest.mark.parametrize("rules", [[], [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]], ids=["any", "restricted"])
def test_network_policies_let_the_nodes_of_a_run_connect(render_chart: Render, rules: list[dict[str, Any]]) -> None:
    """The policy of a run admits its own pods, but a policy that restricts egress of a pod must allow it, too."""
    labels = pod_labels(TransferJob.model_validate(TWO_NODES), "training")
    policy = render_chart({"networkPolicies": {"enabled": True, "egress": rules}})["NetworkPolicy", "topwork-jobs"]
    assert ("egress" in policy["spec"]) == ("Egress" in policy["spec"]["policyTypes"]) == bool(rules)
    to_nodes = [
        rule
        for rule in policy["spec"].get("egress", ())
        for peer in rule.get("to", ())
        if "podSelector" in peer and peer["podSelector"]["matchLabels"].items() <= labels.items()
    ]
    assert [rule["ports"] for rule in to_nodes] == [[{"protocol": "TCP"}]] * bool(rules)


@pytest.mark.parametrize(
    "values",
    [{}, webhook("selfSigned", clusterWide=True), webhook("certManager", namespaces=["team-a"], workers=8)],
    ids=["defaults", "self-signed", "cert-manager"],
)
def test_command_line_of_the_controller_is_valid(render_chart: Render, values: dict[str, Any]) -> None:
    (container,) = render_chart(values)["Deployment", NAME]["spec"]["template"]["spec"]["containers"]
    program, name, *options = [*container["command"], *container["args"]]
    group: Any = typer.main.get_command(app)
    command = group.get_command(group.make_context(program, [], resilient_parsing=True), name)
    parsed = command.make_context(name, options).params
    assert parsed["http_port"] == 8080
    assert parsed["workers"] == values.get("controller", {}).get("workers", 4)


# ── Webhook ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("certificate", ["selfSigned", "certManager"])
def test_webhook_never_blocks_and_validates_only_the_namespaces_of_the_controller(
    render_chart: Render, certificate: str
) -> None:
    objects = render_chart(webhook(certificate, namespaces=["team-a"]))
    (entry,) = objects["ValidatingWebhookConfiguration", CONFIGURATION]["webhooks"]
    assert (entry["failurePolicy"], entry["timeoutSeconds"], entry["sideEffects"]) == ("Ignore", 5, "None")
    (rule,) = entry["rules"]
    assert (rule["apiGroups"], rule["resources"]) == (["topwork.dev"], ["transferjobs", "transfersearches"])
    assert rule["operations"] == ["CREATE", "UPDATE"]
    (expression,) = entry["namespaceSelector"]["matchExpressions"]
    assert expression == {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["ml", "team-a"]}
    service = objects["Service", entry["clientConfig"]["service"]["name"]]
    assert service["spec"]["ports"] == [{"name": "webhook", "port": 443, "targetPort": "webhook", "protocol": "TCP"}]
    assert "--webhook-port=9443" in arguments(objects)
    (container,) = objects["Deployment", NAME]["spec"]["template"]["spec"]["containers"]
    assert {"name": "webhook", "containerPort": 9443, "protocol": "TCP"} in container["ports"]


def test_cluster_wide_webhook_validates_all_namespaces(render_chart: Render) -> None:
    objects = render_chart(webhook("selfSigned", clusterWide=True))
    (entry,) = objects["ValidatingWebhookConfiguration", CONFIGURATION]["webhooks"]
    assert "namespaceSelector" not in entry


def test_cert_manager_issues_the_certificate_that_the_pod_mounts(render_chart: Render) -> None:
    objects = render_chart(webhook("certManager"))
    certificate = objects["Certificate", "topwork-webhook"]["spec"]
    configuration = objects["ValidatingWebhookConfiguration", CONFIGURATION]
    assert configuration["metadata"]["annotations"] == {"cert-manager.io/inject-ca-from": "ml/topwork-webhook"}
    assert certificate["dnsNames"][0] == "topwork-webhook.ml.svc"
    assert objects["Issuer", certificate["issuerRef"]["name"]]["spec"] == {"selfSigned": {}}
    pod = objects["Deployment", NAME]["spec"]["template"]["spec"]
    assert {"name": "certificate", "secret": {"secretName": certificate["secretName"]}} in pod["volumes"]
    assert "--webhook-certificates=/etc/topwork/webhook" in arguments(objects)
    assert "/etc/topwork/webhook" in [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]


def test_self_signed_webhook_names_its_configuration_and_service(render_chart: Render) -> None:
    objects = render_chart(webhook("selfSigned"))
    assert f"--webhook-self-signed={CONFIGURATION}" in arguments(objects)
    assert "--webhook-host=topwork-webhook.ml.svc" in arguments(objects)
    assert not {"Certificate", "Issuer"} & {kind for kind, _ in objects}
    # The controller adds it; in a manifest, Argo CD would remove it again.
    assert "caBundle" not in str(objects["ValidatingWebhookConfiguration", CONFIGURATION])


def test_webhook_is_off_by_default(render_chart: Render) -> None:
    objects = render_chart({})
    assert not {"ValidatingWebhookConfiguration", "Service"} & {kind for kind, _ in objects}
    assert not [argument for argument in arguments(objects) if "webhook" in argument]


def test_namespaces_of_a_cluster_wide_controller_are_rejected(render_chart: Render) -> None:
    with pytest.raises(helm_python.HelmError, match=r"controller.clusterWide is true, so controller.namespaces has no"):
        render_chart(controller(clusterWide=True, namespaces=["team-a"]))


# ── Hooks and GitOps ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_definition_is_upgraded_before_all_other_objects(render_chart: Render) -> None:
    job = render_chart({})["Job", "topwork-crd-upgrade"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-upgrade"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["topwork", "crd", "--apply"]
    assert not [name for _, name in render_chart(controller(crds={"upgrade": False})) if "crd-upgrade" in name]


def test_test_pod_submits_a_sample_as_a_dry_run(render_chart: Render) -> None:
    objects = render_chart({})
    pod = objects["Pod", "topwork-test-submit"]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["topwork", "submit"]
    assert {"--as=transferjob", "--dry-run=server", "--namespace=ml"} <= set(container["args"])
    assert "job.yaml" in objects["ConfigMap", "topwork-test-submit"]["data"]
    assert granted(objects, "topwork-test-submit") == {
        "ml": {
            ("topwork.dev", "transferjobs", ()): {"get", "create", "patch"},
            ("", "configmaps", ("topwork-defaults",)): {"get"},
        }
    }


VALUES = webhook("selfSigned", clusterWide=True, replicas=2) | {
    "jobs": {"cats": {"spec": {"seed": 1}}},
    "networkPolicies": {"enabled": True},
    "monitoring": {"podMonitor": {"enabled": True}, "dashboards": {"enabled": True}},
    "s3": {"accessKeyId": "id", "secretAccessKey": "key"},
    "seaweedfs": {"enabled": True},
}


def test_rendering_without_a_cluster_is_reproducible(chart: helm_python.Chart) -> None:
    # Argo CD renders with `helm template`, again and again.
    first, second = (chart.render(VALUES, name="topwork", namespace="ml") for _ in range(2))
    assert first == second


def test_install_and_upgrade_render_the_same_objects(chart: helm_python.Chart) -> None:
    # Argo CD renders every revision as an installation, and Flux as an upgrade.
    install = chart.render(VALUES, name="topwork", namespace="ml", is_install=True)
    upgrade = chart.render(VALUES, name="topwork", namespace="ml", is_upgrade=True, is_install=False, revision=7)
    assert install == upgrade


def test_only_generated_keys_depend_on_the_cluster_or_on_chance() -> None:
    pattern = re.compile(r"\b(lookup|rand[A-Z]\w+|genCA|genSignedCert|genSelfSignedCert|now|uuidv4)\b")
    templates = {path: path.read_text(encoding="utf-8") for path in (CHART / "templates").rglob("*") if path.is_file()}
    found = [path.name for path, text in templates.items() if pattern.search(text)]
    assert sorted(found) == ["NOTES.txt", "s3-secret.yaml"]
