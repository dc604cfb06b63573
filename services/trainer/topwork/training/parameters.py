"""What of a model is trained and what is kept, told to who watches."""

import keras

from topwork.model.freezing import parameter_groups
from topwork.workspace import Workspace


def show_parameters(model: keras.Model, stage: str, workspace: Workspace) -> None:
    """Say how many parameters of each layer group are trained and kept.

    Args:
        model: The classifier.
        stage: Name of the stage.
        workspace: Progress and metrics.
    """
    groups = parameter_groups(model)
    for group in groups:
        workspace.progress.note(
            "parameters", stage=stage, layers=group.name, trainable=group.trainable, frozen=group.frozen
        )
    workspace.metrics.parameters(sum(one.trainable for one in groups), sum(one.frozen for one in groups))
