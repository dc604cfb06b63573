"""What the metrics report about a TransferJob or a TransferSearch, from its object."""

from datetime import datetime

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.prometheus.controller import TransferJobSample, TransferSearchSample
from topwork.cluster.status.objects import name_of
from topwork.cluster.status.transfer_job_run import read_transfer_job_status
from topwork.cluster.status.transfer_search import read_transfer_search_status
from topwork.cluster.transfer_job_status import TransferJobStatus
from topwork.cluster.transfer_search_status import TransferSearchStatus
from topwork.errors import SettingError

TEAM_LABEL = "team"


def to_sample(obj: KubernetesObject) -> TransferJobSample:
    """Return the sample of a TransferJob."""
    metadata = obj["metadata"]
    try:
        status = read_transfer_job_status(obj)
    except SettingError:  # which its reconciliation reports
        status = TransferJobStatus()
    compute = obj["spec"].get("compute") or {}
    return TransferJobSample(
        namespace=metadata["namespace"],
        name=metadata["name"],
        run=status.run or "",
        state=status.state,
        stage=status.stage or "",
        model=status.model or "",
        queue=compute.get("queue") or "",
        gpus=status.gpus or 0,
        created=datetime.fromisoformat(metadata["creationTimestamp"]).timestamp(),
        started=status.start_time.timestamp() if status.start_time else None,
        completed=status.completion_time.timestamp() if status.completion_time else None,
        gpu_seconds=status.gpu_seconds or 0.0,
        team=(metadata.get("labels") or {}).get(TEAM_LABEL, ""),
    )


def to_search_sample(obj: KubernetesObject) -> TransferSearchSample:
    """Return the sample of a TransferSearch."""
    try:
        status = read_transfer_search_status(obj)
    except SettingError:  # which its reconciliation reports
        status = TransferSearchStatus()
    return TransferSearchSample(
        namespace=obj["metadata"]["namespace"],
        name=name_of(obj),
        trials=status.trials.model_dump(),
        metric=(obj.get("spec") or {}).get("metric") or "accuracy",
        best=status.best.value if status.best else None,
    )
