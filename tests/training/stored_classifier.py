"""Stores a model as if a job had trained it."""

from datetime import UTC, datetime

from topwork.registry.stage_results import Classifier, ParameterCounts


def store_trained(model, job, workspace, folder, history=()):
    """Store a model from 32x32 pixels to the logit of blue and red as the training result of a job."""
    path = folder / "trained.keras"
    model.save(path)
    key = f"runs/{job.run}/transfer/model.keras"
    return Classifier(
        stage="transfer",
        key=key,
        file=workspace.storage.upload(path, key),
        class_names=("blue", "red"),
        image_size=(32, 32),
        history=history,
        best_epoch=1,
        parameters=ParameterCounts(trainable=1, frozen=0),
        started=datetime.now(UTC),
        finished=datetime.now(UTC),
        seconds=1.0,
    )
