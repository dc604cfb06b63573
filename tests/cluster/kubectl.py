"""kubectl for the tests: inspecting the cluster and causing failures."""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    def metrics(self, pod: str, port: int) -> str:
        """Return the metrics page of a pod. The API server requests it from the pod IP, without the kubelet."""
        return self("get", "--raw", f"/api/v1/namespaces/{self.namespace}/pods/{pod}:{port}/proxy/metrics")

    def delete_and_watch(self, pod: str, *, seconds: float) -> list[KubernetesObject]:
        """Delete a pod, and return its states until it is gone, oldest first: the last ones show how it ended."""
        with self.watch("pod", pod) as events:
            wait_for(events, f"first event of {pod}", seconds=seconds)
            self("delete", "pod", pod, "--wait=false")
            wait_for(lambda: events()[-1]["type"] == "DELETED", f"deletion of {pod}", seconds=seconds)
            return [event["object"] for event in events()]

    @contextmanager
    def watch(self, kind: str, *arguments: str) -> Iterator[Callable[[], list[KubernetesObject]]]:
        """Watch objects in the block; the function returns all events so far, each with `type` and `object`."""
        command = [executable("kubectl"), "--namespace", self.namespace, "get", kind, *arguments]
        options = ["--watch", "--output-watch-events", "--output", "json"]
        with tempfile.TemporaryFile("w+") as output:
            watch = subprocess.Popen([*command, *options], stdin=subprocess.DEVNULL, stdout=output)

            def events() -> list[KubernetesObject]:
                output.seek(0)
                return parse_documents(output.read())

            try:
                yield events
            finally:
                watch.kill()
                watch.wait()


def parse_documents(text: str) -> list[KubernetesObject]:
    """Parse consecutive JSON documents; an incomplete one at the end is ignored."""
    decoder, documents, position = json.JSONDecoder(), [], 0
    while (start := text.find("{", position)) >= 0:
        try:
            document, position = decoder.raw_decode(text, start)
        except ValueError:
            break
        documents.append(document)
    return documents
