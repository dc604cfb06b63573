"""Validation of rendered objects: the schema of each Kubernetes version, and restricted Pod Security."""

from collections.abc import Iterator
from typing import Any

import kubernetes_validate

VERSIONS = ("1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SELINUX_TYPES = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}

# Strings that YAML 1.1 or 1.2 reads as another type, or that need quotes or escapes in YAML.
TRICKY_STRINGS = [
    "yes",
    "No",
    "on",
    "y",
    "~",
    "null",
    "1",
    "010",
    "0o7",
    "1_000",
    "12:30",
    "1e3",
    ".5",
    "=",
    "<<",
    "- a",
    "a: b",
]
TRICKY_STRINGS += [
    "a #b",
    "",
    " a ",
    "a\nb",
    "a\n",
    "\n",
    " a\nb\n",
    "a \nb",
    "\ta",
    "ä",
    "\u2028",
    "\x07",
    "\U0001f431",
    "{{a}}",
    "*a",
]


def assert_valid_object(obj: dict[str, Any], versions: tuple[str, ...] = VERSIONS) -> None:
    """Assert that an object is valid in each version, and that its pods meet the restricted standard."""
    for version in versions:
        assert kubernetes_validate.validate(obj, version, strict=True) == version
    if obj["kind"] == "Job":
        assert list(pod_security_violations(obj["spec"]["template"]["spec"])) == []


def pod_security_violations(pod: dict[str, Any]) -> Iterator[str]:
    """List how a pod violates the restricted Pod Security Standard.

    Args:
        pod: Spec of a pod.

    Yields:
        Violations (https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted).
    """
    context = pod.get("securityContext", {})
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            yield f"{key} is set"
    for sysctl in context.get("sysctls", []):
        if sysctl["name"] not in SYSCTLS:
            yield f"sysctl {sysctl['name']}"
    for volume in pod.get("volumes", []):
        if kinds := volume.keys() - VOLUMES - {"name"}:
            yield f"volume {volume['name']} is a {', '.join(kinds)}"
    for container in pod.get("initContainers", []) + pod["containers"] + pod.get("ephemeralContainers", []):
        for violation in _container_violations(container, context):
            yield f"{container['name']}: {violation}"


def _container_violations(container: dict[str, Any], pod_context: dict[str, Any]) -> list[str]:
    own = container.get("securityContext", {})
    effective = pod_context | own
    capabilities, selinux = own.get("capabilities", {}), effective.get("seLinuxOptions", {})
    is_met = {
        "privileged": not own.get("privileged"),
        "allowPrivilegeEscalation is not false": own.get("allowPrivilegeEscalation") is False,
        "capabilities are not dropped": "ALL" in capabilities.get("drop", []),
        "capabilities are added": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
        "runAsNonRoot is not true": effective.get("runAsNonRoot") is True,
        "runAsUser is 0": effective.get("runAsUser") != 0,
        "no seccompProfile": effective.get("seccompProfile", {}).get("type") in {"RuntimeDefault", "Localhost"},
        "appArmorProfile is Unconfined": effective.get("appArmorProfile", {}).get("type") != "Unconfined",
        "procMount is not Default": own.get("procMount", "Default") == "Default",
        "hostProcess": not effective.get("windowsOptions", {}).get("hostProcess"),
        "seLinuxOptions": selinux.get("type") in SELINUX_TYPES and not selinux.get("user") and not selinux.get("role"),
        "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
        "a probe or hook names a host": not any(_probe_hosts(container)),
    }
    return [violation for violation, met in is_met.items() if not met]


def _probe_hosts(container: dict[str, Any]) -> Iterator[str | None]:
    handlers = [container.get(probe, {}) for probe in ("livenessProbe", "readinessProbe", "startupProbe")]
    for handler in [*handlers, *container.get("lifecycle", {}).values()]:
        yield from (handler.get(kind, {}).get("host") for kind in ("httpGet", "tcpSocket"))
