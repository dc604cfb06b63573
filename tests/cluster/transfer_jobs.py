"""A TransferJob in the cluster, and the run that the controller starts for it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ruamel.yaml import YAML
from tests.cluster.environment import DELETION_SECONDS, RUN_SECONDS
from tests.cluster.kubectl import wait_for
from tests.cluster.runs import Run

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.transfer_job_status import Condition, ConditionType, State, TransferJobStatus
from topwork.spec import TransferJob

LONG_TRAINING = {"train": "all", "epochs": 10_000, "batchSize": 8, "featureCache": "off"}


@dataclass(frozen=True)
class TransferJobRun(Run):
    """A TransferJob, its spec file, and the run that its spec describes."""

    def apply(self, *options: str) -> str:
        """Apply the spec file, as a user does."""
        return self.kubectl("apply", "--filename", str(self.file), *options)

    def edit(self, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Let a function change the spec in the file, and return the content of the file."""
        content: dict[str, Any] = YAML(typ="safe").load(self.file.read_text())
        change(content["spec"])
        with self.file.open("w") as stream:
            YAML().dump(content, stream)
        return content

    def with_spec(self, **changes: Any) -> "TransferJobRun":
        """Replace sections of the spec in the file, and return the new run."""
        content = self.edit(lambda spec: spec.update(changes))
        return replace(self, job=TransferJob.model_validate(content))

    def patch(self, **spec: Any) -> None:
        """Change keys of the spec of the object."""
        self.kubectl("patch", "transferjob", self.name, "--type=merge", "--patch", json.dumps({"spec": spec}))

    def transfer_job(self) -> KubernetesObject:
        """Return the object."""
        obj = self.kubectl.get("transferjob", self.name)
        assert obj, f"TransferJob {self.name} does not exist"
        return obj

    def observed_status(self) -> TransferJobStatus:
        """Return the status of the object; that of a new one before the controller has seen it."""
        return TransferJobStatus.model_validate(self.transfer_job().get("status") or {})

    def wait_for_state(self, state: State, *, seconds: float = RUN_SECONDS) -> TransferJobStatus:
        """Wait until the current generation of the object is in a state, and return its status."""

        def find() -> TransferJobStatus | None:
            obj = self.transfer_job()
            status = TransferJobStatus.model_validate(obj.get("status") or {})
            is_current = status.observed_generation == obj["metadata"]["generation"]
            return status if is_current and status.state == state else None

        return wait_for(find, f"state {state} of TransferJob {self.name}", seconds=seconds)

    def wait_for_condition(self, condition: str, *, seconds: float = RUN_SECONDS) -> None:
        """Wait for a condition with kubectl, as scripts do."""
        options = (f"--for=condition={condition}", f"--timeout={seconds:.0f}s")
        self.kubectl("wait", f"transferjob/{self.name}", *options, seconds=seconds + 30)

    def wait_until_stopped(self) -> None:
        """Wait until its Job and pods are gone; the last pod writes a checkpoint first."""
        wait_for(
            lambda: not self.kubernetes_job() and not self.pods(),
            f"deletion of the Job and pods of {self.object_name}",
            seconds=DELETION_SECONDS,
        )

    def condition_of_transfer_job(self, kind: ConditionType) -> Condition:
        """Return a condition of the object."""
        condition = self.observed_status().condition(kind)
        assert condition, f"TransferJob {self.name} has no condition {kind}"
        return condition

    def events(self) -> list[KubernetesObject]:
        """Return the events of the object, oldest first."""
        return self.kubectl.items("event", fields=f"involvedObject.kind=TransferJob,involvedObject.name={self.name}")

    def job_uid(self) -> str | None:
        """Return the UID of its Job; None if there is none."""
        job = self.kubernetes_job()
        return str(job["metadata"]["uid"]) if job else None

    def delete(self) -> None:
        """Delete the object, and all remaining objects of its runs."""
        self.kubectl("delete", "transferjob", self.name, "--ignore-not-found", check=False)
        super().delete()
