"""What any object must keep to: the strict schemas of each version of Kubernetes, and the restricted Pod Security."""

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

# Texts that YAML 1.1 or 1.2 takes for something else, or that a line of YAML can't hold as they stand.
ODD = ["yes", "No", "on", "y", "~", "null", "1", "010", "0o7", "1_000", "12:30", "1e3", ".5", "=", "<<", "- a", "a: b"]
ODD += [
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


def check_object(manifest: dict[str, Any], versions: tuple[str, ...] = VERSIONS) -> None:
    """Fail unless each of the versions takes an object as it stands, and its pods are restricted."""
    for version in versions:
        assert kubernetes_validate.validate(manifest, version, strict=True) == version
    if manifest["kind"] == "Job":
        assert list(violations(manifest["spec"]["template"]["spec"])) == []


def violations(pod: dict[str, Any]) -> Iterator[str]:
    """Say how a pod's spec breaks the restricted standard.

    Args:
        pod: Spec of a pod.

    Yields:
        What is wrong (https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted).
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
        for broken in _of_container(container, context):
            yield f"{container['name']}: {broken}"


def _of_container(container: dict[str, Any], pod: dict[str, Any]) -> list[str]:
    own = container.get("securityContext", {})
    both = pod | own
    capabilities, selinux = own.get("capabilities", {}), both.get("seLinuxOptions", {})
    kept = {
        "privileged": not own.get("privileged"),
        "allowPrivilegeEscalation is not false": own.get("allowPrivilegeEscalation") is False,
        "capabilities are not dropped": "ALL" in capabilities.get("drop", []),
        "capabilities are added": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
        "runAsNonRoot is not true": both.get("runAsNonRoot") is True,
        "runAsUser is 0": both.get("runAsUser") != 0,
        "no seccompProfile": both.get("seccompProfile", {}).get("type") in {"RuntimeDefault", "Localhost"},
        "appArmorProfile is Unconfined": both.get("appArmorProfile", {}).get("type") != "Unconfined",
        "procMount is not Default": own.get("procMount", "Default") == "Default",
        "hostProcess": not both.get("windowsOptions", {}).get("hostProcess"),
        "seLinuxOptions": selinux.get("type") in SELINUX_TYPES and not selinux.get("user") and not selinux.get("role"),
        "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
        "a probe or hook names a host": not any(_hosts(container)),
    }
    return [broken for broken, holds in kept.items() if not holds]


def _hosts(container: dict[str, Any]) -> Iterator[str | None]:
    handlers = [container.get(probe, {}) for probe in ("livenessProbe", "readinessProbe", "startupProbe")]
    for handler in [*handlers, *container.get("lifecycle", {}).values()]:
        yield from (handler.get(kind, {}).get("host") for kind in ("httpGet", "tcpSocket"))
