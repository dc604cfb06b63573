"""A rendered pod, run container by container with podman: what the kubelet would do, read from the pod's template.

Every key of the template is either carried out here, or named below as one that is not the kubelet's; any other fails.
So nothing of the pod is typed again, and nothing of it is left out unnoticed.
"""

import math
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubernetes.utils.quantity import parse_quantity
from tests.image.container import Container
from tests.image.engine import LIMITS

KubernetesObject = dict[str, Any]

# Read by the scheduler, by admission and by Prometheus; a container is the same whatever they say.
NOT_THE_KUBELETS = {
    *("affinity", "nodeSelector", "priorityClassName", "tolerations"),
    *("imagePullSecrets", "serviceAccountName", "fsGroupChangePolicy"),
}
TERMINATION_LOG = "/dev/termination-log"


@dataclass(frozen=True)
class Namespace:
    """What a pod finds in its namespace.

    Attributes:
        config_maps: Texts by key, by name of the ConfigMap.
        secrets: Texts by key, by name of the Secret.
    """

    config_maps: dict[str, dict[str, str]]
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)


class Pod:
    """One pod of a Job, with volumes of its own; its containers are started one by one, by name."""

    def __init__(self, template: KubernetesObject, namespace: Namespace, folder: Path) -> None:
        only(template, "metadata", "spec")
        self._spec = spec = only(
            template["spec"],
            *("initContainers", "containers", "volumes", "securityContext", "restartPolicy"),
            *("terminationGracePeriodSeconds", "automountServiceAccountToken", "enableServiceLinks"),
        )
        assert spec["restartPolicy"] == "Never"
        # Both would put something of the cluster's into the containers, which podman has not got.
        assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
        self._namespace = namespace
        self._folder = folder / f"pod-{uuid.uuid4().hex[:8]}"
        self._folder.mkdir()
        self.volumes = dict(self._volumes())
        self._started: list[Container] = []
        self.containers: dict[str, KubernetesObject] = {
            container["name"]: container for container in [*spec.get("initContainers", ()), *spec["containers"]]
        }

    def start(self, name: str) -> Container:
        """Start a container."""
        container = only(
            self.containers[name],
            *("name", "image", "args", "env", "envFrom", "ports", "resources", "volumeMounts", "securityContext"),
            *("terminationMessagePath", "terminationMessagePolicy"),
        )
        message = self._folder / f"{name}.message"
        message.touch()
        message.chmod(0o666)
        log = container.get("terminationMessagePath", TERMINATION_LOG)
        # The values stay off the command line, where every user of the machine could read the keys.
        variables = self._environment(container)
        options = [
            *LIMITS,
            *("--network", "host"),
            *("--stop-timeout", str(self._spec["terminationGracePeriodSeconds"])),
            *self._user(container["securityContext"]),
            *rights(container["securityContext"]),
            *amounts(container["resources"]),
            *(word for name in variables for word in ("--env", name)),
            *(word for mount in container["volumeMounts"] for word in self._mount(mount)),
            *("--volume", f"{message}:{log}"),
        ]
        started = Container(
            name=f"{self._folder.name}-{name}",
            command=[*options, container["image"], *container["args"]],
            variables=variables,
            message=message,
            falls_back_to_log=container["terminationMessagePolicy"] == "FallbackToLogsOnError",
            mounts=[*(mount["mountPath"] for mount in container["volumeMounts"]), log],
            port=next(iter(container["ports"]))["containerPort"],
        )
        self._started.append(started)
        return started

    def remove(self) -> None:
        """Take away what was started and not waited for."""
        for container in self._started:
            container.remove()

    def overfull(self) -> list[str]:
        """Name the volumes that hold more than their limit, for which the kubelet would evict the pod."""
        limits = {name: bytes_of(volume) for name, volume in self._empty_dirs() if name in self.volumes}
        return [name for name, limit in limits.items() if size_of(self.volumes[name]) > limit]

    def _volumes(self) -> Iterator[tuple[str, Path]]:
        """Make the volumes that are folders: of the ConfigMaps with their files, of the emptyDirs for the group."""
        for volume in self._spec["volumes"]:
            only(volume, "name", "configMap", "emptyDir")
            folder = self._folder / volume["name"]
            if config_map := volume.get("configMap"):
                folder.mkdir()
                for key, text in self._namespace.config_maps[only(config_map, "name")["name"]].items():
                    (folder / key).write_text(text)
            elif volume["emptyDir"].get("medium") != "Memory":
                folder.mkdir()
                if os.geteuid() == 0:
                    os.chown(folder, 0, self._spec["securityContext"]["fsGroup"])
                folder.chmod(0o2777)
            else:
                continue
            yield volume["name"], folder

    def _empty_dirs(self) -> Iterator[tuple[str, KubernetesObject]]:
        for volume in self._spec["volumes"]:
            if "emptyDir" in volume:
                yield volume["name"], only(volume["emptyDir"], "medium", "sizeLimit")

    def _mount(self, mount: KubernetesObject) -> list[str]:
        only(mount, "name", "mountPath", "readOnly")
        if folder := self.volumes.get(mount["name"]):
            return ["--volume", f"{folder}:{mount['mountPath']}{':ro' if mount.get('readOnly') else ''}"]
        memory = dict(self._empty_dirs())[mount["name"]]
        return ["--tmpfs", f"{mount['mountPath']}:rw,exec,nosuid,nodev,mode=1777,size={bytes_of(memory)}"]

    def _user(self, context: KubernetesObject) -> list[str]:
        pod = only(
            self._spec["securityContext"], "runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "seccompProfile"
        )
        # podman's own profile is the default of the runtime.
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod["runAsNonRoot"] or pod["runAsUser"] != 0
        return ["--user", f"{pod['runAsUser']}:{pod['runAsGroup']}", "--group-add", str(pod["fsGroup"])]

    def _environment(self, container: KubernetesObject) -> dict[str, str]:
        """Gather the variables; those of `env` win over those of `envFrom`."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            reference = only(only(source, "secretRef")["secretRef"], "name", "optional")
            if not reference.get("optional") or reference["name"] in self._namespace.secrets:
                found |= self._namespace.secrets[reference["name"]]
        for variable in container["env"]:
            only(variable, "name", "value", "valueFrom")
            found[variable["name"]] = variable["value"] if "value" in variable else amount_of(variable, container)
        return found


def only(manifest: KubernetesObject, *known: str) -> KubernetesObject:
    """Give back a part of the template, if it says nothing that this module does not know."""
    unknown = manifest.keys() - {*known, *NOT_THE_KUBELETS}
    assert not unknown, f"the pod has {sorted(unknown)}, and nothing here carries it out"
    return manifest


def rights(context: KubernetesObject) -> list[str]:
    """What the process may do, and where it may write."""
    only(context, "allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities")
    options = [f"--cap-drop={capability}" for capability in only(context["capabilities"], "drop")["drop"]]
    if not context["allowPrivilegeEscalation"]:
        options.append("--security-opt=no-new-privileges")
    if context["readOnlyRootFilesystem"]:
        # By itself podman would lay a writable /tmp, /run and /var/tmp over the root; Kubernetes doesn't.
        options += ["--read-only", "--read-only-tmpfs=false"]
    return options


def amounts(resources: KubernetesObject) -> list[str]:
    """How much of the machine the container gets at most."""
    limits = only(only(resources, "requests", "limits")["limits"], "cpu", "memory")
    return ["--cpus", str(parse_quantity(limits["cpu"])), "--memory", str(int(parse_quantity(limits["memory"])))]


def amount_of(variable: KubernetesObject, container: KubernetesObject) -> str:
    """Value of a variable that names a resource of its container; Kubernetes rounds parts of a core up, too."""
    reference = only(only(variable["valueFrom"], "resourceFieldRef")["resourceFieldRef"], "resource")["resource"]
    kind, _, resource = reference.partition(".")
    return str(math.ceil(parse_quantity(container["resources"][kind][resource])))


def bytes_of(empty_dir: KubernetesObject) -> int:
    """Limit of an emptyDir."""
    return int(parse_quantity(empty_dir["sizeLimit"]))


def size_of(folder: Path) -> int:
    """What the files below a folder take on the disk."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
