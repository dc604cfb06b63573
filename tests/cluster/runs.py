"""A run in the cluster, as kubectl shows it: its Job, its pods, their logs and how their containers ended."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.kubectl import Kubectl, KubectlError, eventually
from tests.cluster.surroundings import GONE_SECONDS, START_SECONDS

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import JOB_LABEL, ROLE_LABEL, RUN_LABEL
from topwork.cluster.termination_message import TerminationMessage, parse_termination_message
from topwork.spec import TransferJob

# The child of tini is the stage; what kubectl exec starts has no parent in the container.
PROCESS_OF_THE_STAGE = """
import contextlib, os, pathlib, signal, sys
for stat in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(OSError):  # some processes end meanwhile
        parent = stat.read_text().rpartition(')')[2].split()[1]
        if parent == '1':
            os.kill(int(stat.parent.name), getattr(signal, sys.argv[1]))
"""


@dataclass(frozen=True)
class Run:
    """A run and the file of its spec."""

    kubectl: Kubectl
    job: TransferJob
    file: Path

    @property
    def name(self) -> str:
        """The name that its author gave it, `metadata.name`."""
        return self.job.metadata.name

    @property
    def object_name(self) -> str:
        """Name of its Job and its ConfigMap."""
        return self.job.run

    def kubernetes_job(self) -> KubernetesObject | None:
        """Its Job; None where there is none."""
        return self.kubectl.get("job", self.object_name)

    def status(self) -> dict[str, Any]:
        """Status of its Job."""
        found = self.kubernetes_job()
        assert found, f"Job {self.object_name} is not there"
        return dict(found.get("status", {}))

    def condition(self, kind: str) -> dict[str, Any] | None:
        """A condition of its Job that is true."""
        conditions = self.status().get("conditions", [])
        return next((each for each in conditions if each["type"] == kind and each["status"] == "True"), None)

    def pods(self, role: str = "training") -> list[KubernetesObject]:
        """Its pods, oldest first."""
        return self.kubectl.items("pod", f"{RUN_LABEL}={self.object_name},{ROLE_LABEL}={role}")

    def wait_for_pod(self, *, other_than: str | None = None) -> str:
        """Wait for a pod that is not going away, and give its name."""

        def look() -> str | None:
            staying = [pod for pod in self.pods() if "deletionTimestamp" not in pod["metadata"]]
            names = [pod["metadata"]["name"] for pod in staying if pod["status"].get("phase") != "Failed"]
            return next((name for name in reversed(names) if name != other_than), None)

        what = f"a pod of {self.object_name}" + (f" other than {other_than}" if other_than else "")
        return eventually(look, what, seconds=START_SECONDS)

    def log(self, pod: str, container: str) -> str:
        """What a container has written so far; nothing where it has not started."""
        return self.kubectl("logs", pod, "--container", container, check=False)

    def epochs(self, pod: str, container: str = "transfer") -> list[int]:
        """Numbers of the epochs that a container has trained."""
        found = []
        for line in self.log(pod, container).splitlines():
            if line.startswith("{"):
                told = json.loads(line)
                if told.get("message") == "epoch":
                    found.append(int(told["epoch"]))
        return found

    def wait_for_epochs(self, pod: str, count: int = 1, container: str = "transfer") -> list[int]:
        """Wait until a container has trained so many epochs, and give their numbers."""

        def look() -> list[int] | None:
            epochs = self.epochs(pod, container)
            return epochs if len(epochs) >= count else None

        return eventually(look, f"{count} epochs in {container} of {pod}", seconds=START_SECONDS)

    def endings(self, pod: KubernetesObject) -> dict[str, TerminationMessage | None]:
        """How the containers of a pod ended, from their termination messages."""
        statuses = pod["status"].get("initContainerStatuses", []) + pod["status"].get("containerStatuses", [])
        ended = {each["name"]: each["state"].get("terminated") for each in statuses}
        return {name: parse_termination_message(state.get("message", "")) for name, state in ended.items() if state}

    def kill_process(self, pod: str, container: str, signal_name: str = "SIGKILL") -> None:
        """Send a signal to the process of a stage, past the process that waits for it."""
        # The container may be gone before kubectl has heard of the end of its own process.
        self.kubectl.python(pod, container, PROCESS_OF_THE_STAGE, signal_name, check=False)

    def wait_until_gone(self) -> None:
        """Wait until Job, pods and ConfigMap are gone."""

        def look() -> bool:
            return not self.kubectl.items("job,pod,configmap", f"{RUN_LABEL}={self.object_name}")

        eventually(look, f"the end of all objects of {self.object_name}", seconds=GONE_SECONDS)

    def remove(self) -> None:
        """Remove all that is left of it, so that the next test has the node for itself."""
        everything = ("--selector", f"{JOB_LABEL}={self.name}", "--ignore-not-found")
        try:
            self.kubectl("delete", "job,configmap", *everything, "--cascade=foreground", "--timeout=90s", seconds=120)
            self.kubectl("delete", "pod", *everything, "--timeout=90s", seconds=120)
        except (KubectlError, subprocess.TimeoutExpired):
            self.kubectl("delete", "pod", *everything, "--grace-period=0", "--force", "--wait=false", check=False)
