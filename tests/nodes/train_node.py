"""One node of a test run: connects to the others, trains the stages of a job, and writes what it has trained.

    python -c "from tests.nodes.train_node import main; main()" CONFIGURATION.json

`tests.nodes.processes` starts one such process per node.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
import structlog
from tensorflow.python.distribute import collective_all_reduce_strategy

from topwork.cancellation import StopInterrupt, StopRequest
from topwork.cli.output.progress import NoProgress
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage, StorageSettings
from topwork.errors import Stopped, TopworkError
from topwork.nodes.group import NodeGroup
from topwork.nodes.node import Node
from topwork.nodes.rendezvous import join
from topwork.pipeline import prepare_training, train
from topwork.spec import TransferJob
from topwork.training.checkpointing import checkpoints
from topwork.workspace import Workspace


class LoggedProgress(NoProgress):
    """Logs every step, and makes it take some time, so that a test can interrupt it."""

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds

    @contextmanager
    def track(self, what: str, total: int | None) -> Iterator[Any]:
        """Track an operation."""
        yield _LoggedSteps(what, self._step_seconds)


class _LoggedSteps:
    def __init__(self, what: str, step_seconds: float) -> None:
        self._what, self._step_seconds, self._steps = what, step_seconds, 0

    def advance(self, count: int = 1, **_facts: object) -> None:
        self._steps += count
        print(json.dumps({"event": "step", "of": self._what, "number": self._steps}), flush=True)
        time.sleep(self._step_seconds)


def main() -> None:
    """Train, and exit as a container would."""
    configuration = json.loads(Path(sys.argv[1]).read_text())
    checkpoints.EPOCH_SECONDS = 0.0
    structlog.configure(processors=[_print_event])
    stop = StopRequest()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    nodes = NodeGroup()
    code = 0
    try:
        node = Node(configuration["index"], tuple(configuration["addresses"]), configuration["coordinator"], 60.0)
        joined = join(node, {}, is_complete=lambda: False, stop=stop)
        assert joined is not None
        nodes = joined
        nodes.on_failure(_exit_after_failure)
        _train(configuration, nodes, stop)
        nodes.close()
    except StopInterrupt:
        code = Stopped.exit_code
        nodes.fail(Stopped("Stopped."))
    except BaseException as error:
        code = error.exit_code if isinstance(error, TopworkError) else 1
        sys.excepthook(type(error), error, error.__traceback__)
        nodes.fail(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # TensorFlow's server takes many seconds to end after a failure.
    os._exit(code)


def _train(configuration: dict[str, Any], nodes: NodeGroup, stop: StopRequest) -> None:
    job = TransferJob.model_validate(configuration["job"])
    replicas, scratch = configuration["replicas"], Path(configuration["scratch"])
    if nodes.count > 1 and replicas > 1:
        _simulate_devices(replicas)
    storage = Storage(configuration["uri"], StorageSettings(*configuration["s3"]))
    progress = LoggedProgress(configuration["step_seconds"])
    workspace = Workspace(storage, Metrics(), progress, scratch, replicas=replicas, stop=stop, nodes=nodes)
    dataset = prepare_training(job, workspace)
    classifier = train(job, dataset, workspace)
    path = scratch / "end.keras"
    storage.download(classifier.key, path, classifier.file)
    weights = keras.models.load_model(path, compile=False).get_weights()
    np.savez(scratch / "weights.npz", *weights)
    (scratch / "history.json").write_text(json.dumps(classifier.history))


def _simulate_devices(replicas: int) -> None:
    """Make TensorFlow use several CPU devices of a node. It uses one, whatever the number of logical devices."""
    extended = collective_all_reduce_strategy.CollectiveAllReduceExtended
    extended._initialize_local_devices = lambda _self, _resolver, device: (
        tuple(f"{device}/device:CPU:{index}" for index in range(replicas)),
        "CPU",
    )


def _exit_after_failure(error: TopworkError) -> None:
    print(f"ended by its group: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)


def _print_event(_logger: object, _method: str, fields: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps({"time": time.time(), **fields}, default=str), flush=True)
    raise structlog.DropEvent
