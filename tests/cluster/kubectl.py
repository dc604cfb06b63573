"""kubectl for the tests: inspecting the cluster and causing failures."""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pytest
from tests.cluster.environment import executable, in_cluster_config

from topwork.clients.kubernetes import KubernetesObject

Result = TypeVar("Result")


def wait_for(find: Callable[[], Result | None], description: str, *, seconds: float) -> Result:
    """Call `find` once per second until its result is true, and return the result."""
    deadline = time.monotonic() + seconds
    while not (result := find()):
        if time.monotonic() > deadline:
            pytest.fail(f"{description}: not found within {seconds:.0f} seconds")
        time.sleep(1)
    return result


class KubectlError(Exception):
    """kubectl exited with an error."""


@dataclass(frozen=True)
class Kubectl:
    """kubectl in one namespace."""

    namespace: str = "default"

    def __call__(self, *arguments: str, stdin: str | None = None, seconds: float = 120, check: bool = True) -> str:
        result = subprocess.run(
            [executable("kubectl"), "--namespace", self.namespace, *arguments],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if check and result.returncode:
            raise KubectlError(f"kubectl {' '.join(arguments)} exited with {result.returncode}: {result.stderr}")
        return result.stdout

    def apply(self, *objects: KubernetesObject, options: tuple[str, ...] = ()) -> str:
        """Apply objects; return the output of kubectl, one line per object."""
        documents = "\n---\n".join(json.dumps(obj) for obj in objects)  # JSON is YAML
        return self("apply", "--filename", "-", *options, stdin=documents)

    def get(self, kind: str, name: str) -> KubernetesObject | None:
        """Return an object; None if it does not exist."""
        text = self("get", kind, name, "--ignore-not-found", "--output", "json")
        return json.loads(text) if text.strip() else None

    def items(self, kind: str, labels: str = "", fields: str = "") -> list[KubernetesObject]:
        """Return all objects of a kind with these labels and fields, oldest first."""
        selectors = [f"--selector={labels}"] * bool(labels) + [f"--field-selector={fields}"] * bool(fields)
        items = json.loads(self("get", kind, *selectors, "--output", "json"))["items"]
        return sorted(items, key=lambda item: str(item["metadata"]["creationTimestamp"]))

    def config(self) -> KubernetesObject:
        """Return the kubeconfig in use, reduced to its current context, including credentials."""
        text = self("config", "view", "--raw", "--flatten", "--minify", "--output", "json", check=False)
        config: KubernetesObject = json.loads(text or "{}")
        return config if config.get("clusters") else in_cluster_config()

    def evict(self, pod: str) -> None:
        """Evict a pod through the Eviction API, as a drain or an autoscaler does."""
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": self.namespace},
        }
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/eviction"
        self("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))

    def python(self, pod: str, container: str, script: str, *arguments: str, check: bool = True) -> str:
        """Run a script with Python in a running container."""
        return self("exec", pod, "--container", container, "--", "python", "-c", script, *arguments, check=check)
