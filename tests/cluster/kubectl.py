"""kubectl as a person has it: to look at the cluster, and to disturb it."""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pytest
from tests.cluster.surroundings import in_cluster_config, program

from topwork.clients.kubernetes import KubernetesObject

Found = TypeVar("Found")


def eventually(look: Callable[[], Found | None], what: str, *, seconds: float) -> Found:
    """Look once a second until there is something to see, and give it."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not seen within {seconds:.0f} seconds")
        time.sleep(1)
    return found


class KubectlError(Exception):
    """kubectl ended with an error, which is the text."""


@dataclass(frozen=True)
class Kubectl:
    """kubectl in one namespace."""

    namespace: str = "default"

    def __call__(self, *arguments: str, stdin: str | None = None, seconds: float = 120, check: bool = True) -> str:
        ended = subprocess.run(
            [program("kubectl"), "--namespace", self.namespace, *arguments],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if check and ended.returncode:
            raise KubectlError(f"kubectl {' '.join(arguments)} ended with {ended.returncode}: {ended.stderr}")
        return ended.stdout

    def apply(self, *manifests: KubernetesObject, options: tuple[str, ...] = ()) -> str:
        """Apply objects, and give what kubectl says: a line for each."""
        documents = "\n---\n".join(json.dumps(each) for each in manifests)  # JSON is YAML
        return self("apply", "--filename", "-", *options, stdin=documents)

    def get(self, kind: str, name: str) -> KubernetesObject | None:
        """An object; None where it is gone."""
        text = self("get", kind, name, "--ignore-not-found", "--output", "json")
        return json.loads(text) if text.strip() else None

    def items(self, kind: str, labels: str = "", fields: str = "") -> list[KubernetesObject]:
        """All objects of a kind with these labels and fields, oldest first."""
        selectors = [f"--selector={labels}"] * bool(labels) + [f"--field-selector={fields}"] * bool(fields)
        found = json.loads(self("get", kind, *selectors, "--output", "json"))["items"]
        return sorted(found, key=lambda item: str(item["metadata"]["creationTimestamp"]))

    def config(self) -> KubernetesObject:
        """The kubeconfig in use, with its current context only and with its secrets."""
        text = self("config", "view", "--raw", "--flatten", "--minify", "--output", "json", check=False)
        found: KubernetesObject = json.loads(text or "{}")
        return found if found.get("clusters") else in_cluster_config()

    def evict(self, pod: str) -> None:
        """Evict a pod as a drain or an autoscaler does: through the Eviction API."""
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": self.namespace},
        }
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/eviction"
        self("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))

    def python(self, pod: str, container: str, script: str, *arguments: str, check: bool = True) -> str:
        """Run a script with the Python of a container that is running."""
        return self("exec", pod, "--container", container, "--", "python", "-c", script, *arguments, check=check)
