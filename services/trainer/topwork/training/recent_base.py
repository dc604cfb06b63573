"""Builds the classifier of a job. The trials of a search that train only a head get the same base in a process."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from topwork.model.classifier import BaseOutput, build_base, build_classifier, build_head
from topwork.registry.stage_keys import read_base_version
from topwork.spec import TransferJob
from topwork.spec.digest import digest_of
from topwork.workspace import Workspace

_KIND = "base"


@dataclass(frozen=True)
class _RecentBase:
    """A base whose weights do not change.

    Attributes:
        base: The base.
        random_state: State of Python's random numbers after it was built. Keras draws the seeds of layers from them, so
            that the head gets the same initial weights with this base and with a new one.
    """

    base: BaseOutput
    random_state: Any


def build_job_classifier(
    job: TransferJob, classes: int, workspace: Workspace, fetch_file: Callable[[], Path | None]
) -> keras.Model:
    """Build the initial classifier of a job in float32, in the scope of the strategy, after the seeds were set.

    Args:
        job: The job.
        classes: Number of classes.
        workspace: Storage of the job, and recent results of this process.
        fetch_file: Fetches the file that the base is built from; called only if the base has to be built.

    Returns:
        The classifier; see `build_classifier`.

    Raises:
        SpecError: If the base cannot be built for the image size.
        DataError: If a file of the base does not exist, or does not match the spec.
        UnavailableError: If storage cannot be reached, or ImageNet weights cannot be downloaded.
    """
    settings, image_size = job.spec.model, job.spec.dataset.image_size
    is_trial = not job.spec.publish.enabled and job.spec.transfer.train == "head"
    if not is_trial or tf.distribute.get_strategy().num_replicas_in_sync > 1:
        return build_classifier(settings, image_size, classes, fetch_file())
    version = read_base_version(settings.base, workspace.storage)
    key = digest_of([settings.base.model_dump(mode="json"), version, image_size, job.spec.seed])
    recent: _RecentBase | None = workspace.recent.find(_KIND, key)
    if recent is None:
        workspace.recent.drop(_KIND)
        base = build_base(settings.base, image_size, fetch_file())
        recent = _RecentBase(base, random.getstate())
        workspace.recent.keep(_KIND, key, recent)
    random.setstate(recent.random_state)
    # Otherwise, the base would refer to the heads of all trials.
    recent.base.output._keras_history.operation._outbound_nodes.clear()
    head = build_head(recent.base.output, settings.head, classes)
    return keras.Model(recent.base.image, head, name="classifier")
