"""Runs the containers of a rendered pod with podman according to the pod template, as the kubelet does.

Each key of the template is either implemented here or listed in `IGNORED_KEYS`; any other key fails the test. The
tests therefore cover the complete pod without repeating its settings.
"""

import math
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubernetes.utils.quantity import parse_quantity
from tests.image.container import Container
from tests.image.podman import LIMITS

from topwork.cluster.names import JOB_UID_LABEL, RUN_LABEL

KubernetesObject = dict[str, Any]

# Keys for the scheduler, for admission and for Prometheus, which do not affect the containers.
IGNORED_KEYS = {
    *("affinity", "nodeSelector", "priorityClassName", "tolerations"),
    *("imagePullSecrets", "serviceAccountName", "fsGroupChangePolicy"),
}
TERMINATION_LOG = "/dev/termination-log"


@dataclass(frozen=True)
class Namespace:
    """ConfigMaps and Secrets of a namespace.

    Attributes:
        config_maps: Data by name of the ConfigMap and key.
        secrets: Data by name of the Secret and key.
    """

    config_maps: dict[str, dict[str, str]]
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)


class Pod:
    """A pod of a Job with its volumes. Its containers are started individually, by name."""

    def __init__(self, template: KubernetesObject, namespace: Namespace, directory: Path) -> None:
        require_known_keys(template, "metadata", "spec")
        self._spec = spec = require_known_keys(
            template["spec"],
            *("initContainers", "containers", "volumes", "securityContext", "restartPolicy"),
            *("terminationGracePeriodSeconds", "automountServiceAccountToken", "enableServiceLinks"),
        )
        assert spec["restartPolicy"] == "Never"
        # Both would add cluster data to the containers.
        assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
        # Kubernetes adds the UID of the Job to the labels of its pods: all pods of a run have the same.
        labels = template["metadata"]["labels"]
        labels = {**labels, JOB_UID_LABEL: str(uuid.uuid5(uuid.NAMESPACE_URL, labels[RUN_LABEL]))}
        self._metadata = {"labels": labels, "annotations": template["metadata"].get("annotations", {})}
        self._namespace = namespace
        self._directory = directory / f"pod-{uuid.uuid4().hex[:8]}"
        self._directory.mkdir()
        self.volumes = dict(self._volumes())
        self._started: list[Container] = []
        self.containers: dict[str, KubernetesObject] = {
            container["name"]: container for container in [*spec.get("initContainers", ()), *spec["containers"]]
        }

    def start(self, name: str) -> Container:
        """Start a container."""
        container = require_known_keys(
            self.containers[name],
            *("name", "image", "args", "env", "envFrom", "ports", "resources", "volumeMounts", "securityContext"),
            *("terminationMessagePath", "terminationMessagePolicy"),
        )
        termination_log = self._directory / f"{name}.message"
        termination_log.touch()
        termination_log.chmod(0o666)
        mount_path = container.get("terminationMessagePath", TERMINATION_LOG)
        # Credentials must not be on the command line, because all users of the machine can read it.
        variables = self._environment(container)
        options = [
            *LIMITS,
            *("--network", "host"),
            *("--stop-timeout", str(self._spec["terminationGracePeriodSeconds"])),
            *self._user(container["securityContext"]),
            *security_options(container["securityContext"]),
            *resource_options(container["resources"]),
            *(word for name in variables for word in ("--env", name)),
            *(word for mount in container["volumeMounts"] for word in self._mount(mount)),
            *("--volume", f"{termination_log}:{mount_path}"),
        ]
        started = Container(
            name=f"{self._directory.name}-{name}",
            command=[*options, container["image"], *container["args"]],
            variables=variables,
            termination_log=termination_log,
            fallback_to_logs=container["terminationMessagePolicy"] == "FallbackToLogsOnError",
            mounts=[*(mount["mountPath"] for mount in container["volumeMounts"]), mount_path],
            port=next(iter(container["ports"]))["containerPort"],
        )
        self._started.append(started)
        return started

    def remove(self) -> None:
        """Remove the containers that were started."""
        for container in self._started:
            container.remove()

    def volumes_over_limit(self) -> list[str]:
        """List the volumes above their size limit, for which the kubelet would evict the pod."""
        limits = {name: size_limit(volume) for name, volume in self._empty_dirs() if name in self.volumes}
        return [name for name, limit in limits.items() if disk_usage(self.volumes[name]) > limit]

    def _volumes(self) -> Iterator[tuple[str, Path]]:
        """Create the directories of the volumes: ConfigMaps with their files, and writable emptyDirs."""
        for volume in self._spec["volumes"]:
            require_known_keys(volume, "name", "configMap", "emptyDir")
            directory = self._directory / volume["name"]
            if config_map := volume.get("configMap"):
                directory.mkdir()
                for key, text in self._namespace.config_maps[require_known_keys(config_map, "name")["name"]].items():
                    (directory / key).write_text(text)
            elif volume["emptyDir"].get("medium") != "Memory":
                directory.mkdir()
                if os.geteuid() == 0:
                    os.chown(directory, 0, self._spec["securityContext"]["fsGroup"])
                directory.chmod(0o2777)
            else:
                continue
            yield volume["name"], directory

    def _empty_dirs(self) -> Iterator[tuple[str, KubernetesObject]]:
        for volume in self._spec["volumes"]:
            if "emptyDir" in volume:
                yield volume["name"], require_known_keys(volume["emptyDir"], "medium", "sizeLimit")

    def _mount(self, mount: KubernetesObject) -> list[str]:
        require_known_keys(mount, "name", "mountPath", "readOnly")
        if directory := self.volumes.get(mount["name"]):
            return ["--volume", f"{directory}:{mount['mountPath']}{':ro' if mount.get('readOnly') else ''}"]
        memory = dict(self._empty_dirs())[mount["name"]]
        return ["--tmpfs", f"{mount['mountPath']}:rw,exec,nosuid,nodev,mode=1777,size={size_limit(memory)}"]

    def _user(self, context: KubernetesObject) -> list[str]:
        pod = require_known_keys(
            self._spec["securityContext"], "runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "seccompProfile"
        )
        # podman's default profile is RuntimeDefault.
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod["runAsNonRoot"] or pod["runAsUser"] != 0
        return ["--user", f"{pod['runAsUser']}:{pod['runAsGroup']}", "--group-add", str(pod["fsGroup"])]

    def _environment(self, container: KubernetesObject) -> dict[str, str]:
        """Return the variables of `envFrom` and `env`; those of `env` take precedence."""
        variables: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            reference = require_known_keys(require_known_keys(source, "secretRef")["secretRef"], "name", "optional")
            if not reference.get("optional") or reference["name"] in self._namespace.secrets:
                variables |= self._namespace.secrets[reference["name"]]
        for variable in container["env"]:
            require_known_keys(variable, "name", "value", "valueFrom")
            name = variable["name"]
            variables[name] = variable["value"] if "value" in variable else self._value_from(variable, container)
        return variables

    def _value_from(self, variable: KubernetesObject, container: KubernetesObject) -> str:
        """Return the value of a variable with a `fieldRef` to a label or annotation, or with a `resourceFieldRef`."""
        source = require_known_keys(variable["valueFrom"], "fieldRef", "resourceFieldRef")
        if "resourceFieldRef" in source:
            return resource_value(variable, container)
        path = require_known_keys(source["fieldRef"], "fieldPath")["fieldPath"]
        match = re.fullmatch(r"metadata\.(labels|annotations)\['([^']+)'\]", path)
        assert match, path
        return str(self._metadata[match[1]].get(match[2], ""))


def require_known_keys(part: KubernetesObject, *known: str) -> KubernetesObject:
    """Return a part of the template after checking that this module implements all of its keys."""
    unknown = part.keys() - {*known, *IGNORED_KEYS}
    assert not unknown, f"the pod template has {sorted(unknown)}, which tests/image/pod.py does not implement"
    return part


def security_options(context: KubernetesObject) -> list[str]:
    """Return the options for the container's security context."""
    require_known_keys(context, "allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities")
    options = [f"--cap-drop={capability}" for capability in require_known_keys(context["capabilities"], "drop")["drop"]]
    if not context["allowPrivilegeEscalation"]:
        options.append("--security-opt=no-new-privileges")
    if context["readOnlyRootFilesystem"]:
        # By default, podman mounts a writable tmpfs on /tmp, /run and /var/tmp; Kubernetes does not.
        options += ["--read-only", "--read-only-tmpfs=false"]
    return options


def resource_options(resources: KubernetesObject) -> list[str]:
    """Return the options for the resource limits."""
    limits = require_known_keys(resources, "requests", "limits")["limits"]
    # Podman does not limit disk space; see `volumes_over_limit`.
    require_known_keys(limits, "cpu", "memory", "ephemeral-storage")
    return ["--cpus", str(parse_quantity(limits["cpu"])), "--memory", str(int(parse_quantity(limits["memory"])))]


def resource_value(variable: KubernetesObject, container: KubernetesObject) -> str:
    """Return the value of a variable with a `resourceFieldRef`. Like Kubernetes, this rounds up fractions of a core."""
    reference = require_known_keys(
        require_known_keys(variable["valueFrom"], "resourceFieldRef")["resourceFieldRef"], "resource"
    )["resource"]
    kind, _, resource = reference.partition(".")
    return str(math.ceil(parse_quantity(container["resources"][kind][resource])))


def size_limit(empty_dir: KubernetesObject) -> int:
    """Return the size limit of an emptyDir in bytes."""
    return int(parse_quantity(empty_dir["sizeLimit"]))


def disk_usage(directory: Path) -> int:
    """Return the disk usage of all files in a directory in bytes."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))
