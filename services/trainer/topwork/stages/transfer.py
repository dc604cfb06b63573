"""Stage 1: the base frozen and a new head trained, or all of a new model."""

import keras

from topwork.data.stored import StoredDataset
from topwork.model.augmentation import augment
from topwork.model.classifier import build
from topwork.spec import TransferJob
from topwork.training.base_files import base_file, mirror
from topwork.training.features import views
from topwork.training.plan import Phase, Plan
from topwork.training.stage import found, train
from topwork.training.trained import Classifier, read_done
from topwork.workspace import Workspace


def transfer(job: TransferJob, dataset: StoredDataset, workspace: Workspace) -> Classifier:
    """Put a new head on the base and train it; the base is frozen unless `spec.transfer.train` is all.

    Args:
        job: The job.
        dataset: The stored dataset.
        workspace: Storage, metrics, progress and scratch.

    Returns:
        The classifier with the best weights, stored.

    Raises:
        SpecError: If the base or the settings don't go with the data or the replicas.
        DataError: If the data or the base can't be used.
        UnavailableError: If storage or a download failed.
        Stopped: If asked to stop; the checkpoint is stored.
    """
    with workspace.metrics.stage("transfer"):
        if (done := read_done(workspace.storage, job.run, "transfer")) is not None:
            return found(done, workspace)
        spec = job.spec.transfer
        plan = Plan(
            stage="transfer",
            phases=(Phase("all" if spec.train == "all" else "none", spec.epochs, spec.optimizer),),
            batch_size=spec.batch_size,
            loss=spec.loss,
            balanced=spec.class_weights == "balanced",
            early_stopping=spec.early_stopping,
            seed=job.spec.seed,
            views=views(job.spec, augmented=augment(job.spec.augmentation) is not None),
            # A new base must learn its statistics; a trained one has some worth keeping.
            batch_norm=not job.spec.model.base.is_pretrained,
        )
        return train(plan, lambda: _start(job, dataset, workspace), [], job, dataset, workspace)


def _start(job: TransferJob, dataset: StoredDataset, workspace: Workspace) -> keras.Model:
    settings = job.spec.model
    classes = len(dataset.facts.class_names)
    file = base_file(settings.base, workspace)
    model = build(settings, job.spec.dataset.image_size, classes, file)
    if file is None and settings.base.is_pretrained:
        mirror(settings.base, model.get_layer("base"), workspace)
    return model
