"""Inputs of training: the model in its precision, and its data: images, or cached features of frozen layers."""

from dataclasses import dataclass

import keras
import structlog

from topwork.data.batches import Augment
from topwork.data.local_dataset import LocalDataset
from topwork.model.augmentation import build_augmentation
from topwork.model.classifier import with_precision
from topwork.model.freezing import set_trainable
from topwork.model.layer_tree import leaf_layers
from topwork.model.partition import Partition, count_multiplications, partition_model
from topwork.training.distribution.strategy import choose_dtype_policy
from topwork.training.feature_cache.features import compute_features
from topwork.training.feature_cache.policy import should_cache_features
from topwork.training.feature_cache.request import FeatureRequest
from topwork.training.plan import StageContext

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class TrainingInputs:
    """A model to train, and its training data.

    Attributes:
        model: The whole classifier, or its trainable part on cached features. It shares the layers of the classifier.
        data: Training and validation split: images, or cached features.
        augment: Augmentation of the training images; None for cached features, whose images are already augmented.
        from_cache: Whether the data is cached features.
    """

    model: keras.Model
    data: LocalDataset
    augment: Augment | None
    from_cache: bool

    @property
    def precision(self) -> str:
        """The types that the layers of the model compute in, such as `bfloat16 and float32`."""
        return " and ".join(sorted({layer.compute_dtype for layer in leaf_layers(self.model)}))


def prepare_model(model: keras.Model, context: StageContext) -> tuple[keras.Model, Partition | None]:
    """Convert a classifier to the dtype policy that suits the computation of each step, and partition it.

    Call it in the scope of the strategy. It is a collective operation: nodes that support bfloat16 do without it if one
    of them does not.

    Args:
        model: Classifier in float32.
        context: The stage.

    Returns:
        The classifier, and its frozen and trainable part; None if no layer with weights can be separated.
    """
    plan = context.plan
    partition = _partition(model, context)
    use_cache, _ = should_cache_features(plan.feature_cache, plan.epochs, partition)
    multiplications = count_multiplications(partition.trainable_part if partition and use_cache else model)
    policies = context.workspace.nodes.gather(choose_dtype_policy(context.job.spec.compute.precision, multiplications))
    converted = with_precision(model, policies[0] if len(set(policies)) == 1 else "float32")
    return converted, partition if converted is model else _partition(converted, context)


def prepare_inputs(
    context: StageContext, model: keras.Model, partition: Partition | None, data: LocalDataset
) -> TrainingInputs:
    """Choose between images and cached features, and compute the features. This is a collective operation.

    Args:
        context: The stage.
        model: The classifier.
        partition: Its frozen and trainable part, from `prepare_model`.
        data: The images.

    Returns:
        The model to train, and its data.

    Raises:
        SettingError: If the spec requires the feature cache and there is no space for it.
        Stopped: If a stop was requested on any node while features were computed.
        UnavailableError: If features cannot be stored for too long, or those of another node cannot be read.
    """
    plan = context.plan
    augment = build_augmentation(context.job.spec.augmentation)
    use_cache, reason = should_cache_features(plan.feature_cache, plan.epochs, partition)
    log.info("feature cache", stage=plan.stage, used=use_cache, reason=reason)
    if partition and use_cache:
        features = compute_features(FeatureRequest(context, data, partition, augment))
        if features is not None:
            return TrainingInputs(partition.trainable_part, features, augment=None, from_cache=True)
    with model.distribute_strategy.scope():
        combined = partition.recombine() if partition else model
    return TrainingInputs(combined, data, augment, from_cache=False)


def _partition(model: keras.Model, context: StageContext) -> Partition | None:
    plan = context.plan
    set_trainable(model.get_layer("base"), plan.phases[-1].unfrozen, batch_norm=plan.train_batch_norm)
    return partition_model(model)
