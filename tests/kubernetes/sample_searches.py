"""Sample TransferSearches, and what their trials result in."""

import copy
import math
from typing import Any

from controlled_cluster import ControlledCluster

Object = dict[str, Any]
RATE = "transfer.optimizer.learningRate"
DROPOUT = "model.head.dropout"
TEMPLATE: Object = {
    "storage": "s3://bucket/topwork",
    "dataset": {
        "source": {"folder": {"uri": "s3://photos/flowers/"}},
        "splits": {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
        "imageSize": [96, 96],
    },
    "model": {"base": {"application": "MobileNetV2"}},
    "transfer": {"epochs": 9},
    "publish": {"formats": ["keras"]},
    "compute": {"gpus": 2, "memory": "32Gi", "retries": 3},
}
SEARCH: Object = {
    "apiVersion": "topwork.dev/v1alpha1",
    "kind": "TransferSearch",
    "metadata": {"name": "flowers", "labels": {"team": "vision"}},
    "spec": {
        "template": TEMPLATE,
        "space": {RATE: {"logUniform": [1e-5, 1e-1]}, DROPOUT: {"uniform": [0.0, 0.5]}},
        "trials": 4,
        "sampler": "random",
    },
}


def search(**spec: Any) -> Object:
    """Return a TransferSearch with changed keys of its spec."""
    content = copy.deepcopy(SEARCH)
    content["spec"] |= spec
    return content


def evaluate(spec: Object) -> dict[str, float]:
    """Return metrics that are best for a learning rate of 0.001, and grow with the number of epochs."""
    rate, epochs = spec["transfer"]["optimizer"]["learningRate"], spec["transfer"]["epochs"]
    loss = 0.1 + 0.1 * abs(math.log10(rate) + 3) + 0.5 / epochs
    return {"accuracy": 1.0 - loss / 2, "loss": loss}


class SearchWorld(ControlledCluster):
    """A controlled cluster in which the tests look at TransferSearches."""

    def __init__(self, *arguments: Any, **simulation: Any) -> None:
        super().__init__(*arguments, **{"stage_seconds": 20.0, "shutdown_seconds": 5.0} | simulation)
        self.kubernetes.kubelet.evaluate = evaluate

    def finish(self) -> None:
        """Let all trials run to their end, without the time that they take."""
        self.kubernetes.kubelet.stage_seconds = 0.0
        self.advance(20)

    def search_status(self, name: str = "flowers") -> Object:
        stored = self.server.get("TransferSearch", name)
        return (stored or {}).get("status") or {}

    def search_condition(self, kind: str) -> Object:
        return next(item for item in self.search_status()["conditions"] if item["type"] == kind)

    def trial_jobs(self) -> dict[str, Object]:
        """The TransferJobs by name."""
        return {obj["metadata"]["name"]: obj for obj in self.server.list("TransferJob")}

    def states(self) -> dict[str, str]:
        """State of each TransferJob."""
        return {name: (obj.get("status") or {}).get("state", "") for name, obj in self.trial_jobs().items()}

    def change_search(self, **spec: Any) -> None:
        """Change keys of the spec, as `kubectl edit` does."""
        stored = self.cluster.get("TransferSearch", "flowers")
        assert stored is not None
        self.cluster.replace(stored | {"spec": stored["spec"] | spec})

    def search_events(self) -> list[tuple[str, str]]:
        """Reason and message of the events about TransferSearches."""
        events = [event for event in self.server.list("Event") if event["involvedObject"]["kind"] == "TransferSearch"]
        events.sort(key=lambda event: int(event["metadata"]["resourceVersion"]))
        return [(event["reason"], event["message"]) for event in events]
