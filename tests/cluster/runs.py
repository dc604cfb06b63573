"""A run in the cluster, inspected with kubectl: its Job, pods, logs and termination messages."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.environment import DELETION_SECONDS, RUN_SECONDS, START_SECONDS
from tests.cluster.kubectl import Kubectl, KubectlError, wait_for

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import JOB_LABEL, ROLE_LABEL, RUN_LABEL
from topwork.cluster.termination_message import TerminationMessage, parse_termination_message
from topwork.spec import TransferJob


@dataclass(frozen=True)
class Run:
    """A run and its spec file."""

    kubectl: Kubectl
    job: TransferJob
    file: Path

    @property
    def name(self) -> str:
        """Name of the job: `metadata.name`."""
        return self.job.metadata.name

    @property
    def object_name(self) -> str:
        """Name of its Job and its ConfigMap."""
        return self.job.run

    def kubernetes_job(self) -> KubernetesObject | None:
        """Return its Job; None if it does not exist."""
        return self.kubectl.get("job", self.object_name)

    def status(self) -> dict[str, Any]:
        """Return the status of its Job."""
        job = self.kubernetes_job()
        assert job, f"Job {self.object_name} does not exist"
        return dict(job.get("status", {}))

    def condition(self, kind: str) -> dict[str, Any] | None:
        """Return a condition of its Job if its status is True."""
        conditions = self.status().get("conditions", [])
        return next((item for item in conditions if item["type"] == kind and item["status"] == "True"), None)

    def pods(self, role: str = "training") -> list[KubernetesObject]:
        """Return its pods, oldest first."""
        return self.kubectl.items("pod", f"{RUN_LABEL}={self.object_name},{ROLE_LABEL}={role}")

    def wait_for_pod(self, *, other_than: str | None = None) -> str:
        """Wait for a pod that is not being deleted, and return its name."""

        def find() -> str | None:
            remaining = [pod for pod in self.pods() if "deletionTimestamp" not in pod["metadata"]]
            names = [pod["metadata"]["name"] for pod in remaining if pod["status"].get("phase") != "Failed"]
            return next((name for name in reversed(names) if name != other_than), None)

        description = f"a pod of {self.object_name}" + (f" other than {other_than}" if other_than else "")
        return wait_for(find, description, seconds=START_SECONDS)

    def log(self, pod: str, container: str) -> str:
        """Return the log of a container so far; empty if it has not started."""
        return self.kubectl("logs", pod, "--container", container, check=False)

    def epochs(self, pod: str, container: str = "transfer") -> list[int]:
        """Return the numbers of the epochs that a container has completed."""
        epochs = []
        for line in self.log(pod, container).splitlines():
            if line.startswith("{"):
                entry = json.loads(line)
                if entry.get("message") == "epoch":
                    epochs.append(int(entry["epoch"]))
        return epochs

    def wait_for_epochs(self, pod: str, count: int = 1, container: str = "transfer") -> list[int]:
        """Wait until a container has completed this many epochs, and return their numbers."""

        def find() -> list[int] | None:
            epochs = self.epochs(pod, container)
            return epochs if len(epochs) >= count else None

        return wait_for(find, f"{count} epochs in {container} of {pod}", seconds=START_SECONDS)

    def termination_messages(self, pod: KubernetesObject) -> dict[str, TerminationMessage | None]:
        """Return the termination messages of the containers of a pod."""
        statuses = pod["status"].get("initContainerStatuses", []) + pod["status"].get("containerStatuses", [])
        terminated = {status["name"]: status["state"].get("terminated") for status in statuses}
        return {
            name: parse_termination_message(state.get("message", "")) for name, state in terminated.items() if state
        }

    def failures(self) -> int:
        """Return the number of failures that the Job has counted."""
        return int(self.status().get("failed", 0))

    def wait_for_other_epochs(self, pod: str) -> list[int]:
        """Wait until any other pod than this one has completed an epoch of transfer, and return the epoch numbers."""

        def find() -> list[int] | None:
            names = [item["metadata"]["name"] for item in self.pods()]
            return next((epochs for name in names if name != pod and (epochs := self.epochs(name))), None)

        return wait_for(find, f"epochs in a pod of {self.object_name} other than {pod}", seconds=RUN_SECONDS)

    def wait_until_deleted(self) -> None:
        """Wait until its Job, pods and ConfigMap are deleted."""

        def find() -> bool:
            return not self.kubectl.items("job,pod,configmap", f"{RUN_LABEL}={self.object_name}")

        wait_for(find, f"deletion of all objects of {self.object_name}", seconds=DELETION_SECONDS)

    def delete(self) -> None:
        """Delete all remaining objects of the run, so that the next test can use all resources of the node."""
        selector = ("--selector", f"{JOB_LABEL}={self.name}", "--ignore-not-found")
        try:
            self.kubectl("delete", "job,configmap", *selector, "--cascade=foreground", "--timeout=90s", seconds=120)
            self.kubectl("delete", "pod", *selector, "--timeout=90s", seconds=120)
        except (KubectlError, subprocess.TimeoutExpired):
            self.kubectl("delete", "pod", *selector, "--grace-period=0", "--force", "--wait=false", check=False)
