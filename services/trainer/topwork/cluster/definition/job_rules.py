"""CEL rules that check several sections of the spec together."""

from collections.abc import Iterator

from topwork.cluster.definition.cel import (
    CelRule,
    any_of,
    format_number,
    format_string,
    format_text,
    is_set,
    mirrors,
    text,
)
from topwork.spec import compute, job
from topwork.spec.applications import MIN_SIDE

STAGES = ("transfer", "fineTune")
# Numbers of nodes, and of replicas on each of them, if `self.compute` is set.
NODES = "(has(self.compute.nodes) ? self.compute.nodes : 1)"
GPUS = "(has(self.compute.gpus) && self.compute.gpus > 1 ? self.compute.gpus : 1)"


@mirrors(job.batch_size_is_divisible_by_replicas)
def _batch_sizes() -> Iterator[CelRule]:
    # Without nodes or gpus, the defaults of the namespace decide: replicas is then a divisor of their number.
    replicas = f"({NODES} * {GPUS})"
    of_nodes = format_text("spec.compute.nodes {}", f"string({NODES})")
    of_both = format_text(
        "spec.compute.nodes {} * gpus {} = {}", f"string({NODES})", f"string({GPUS})", f"string({replicas})"
    )
    of_gpus = format_text("spec.compute.gpus {}", f"string({GPUS})")
    for stage in STAGES:
        size = f"self.{stage}.batchSize"
        yield CelRule(
            f"has(self.compute) && {is_set(size)} && {size} % {replicas} != 0",
            text(
                "{} is not divisible by {}, but each replica processes an equal part of the global batch. Try {}{}.",
                f"string({size})",
                f"({NODES} > 1 ? ({GPUS} > 1 ? {of_both} : {of_nodes}) : {of_gpus})",
                f'({size} > {replicas} ? {format_text("{} or ", f"string({size} / {replicas} * {replicas})")} : "")',
                f"string((1 + {size} / {replicas}) * {replicas})",
            ),
            f"{stage}.batchSize",
        )


@mirrors(job.gradient_accumulation_requires_one_replica)
def _gradient_accumulation() -> Iterator[CelRule]:
    nodes, gpus = f"string({NODES})", f"string({GPUS})"
    both, only_nodes, only_gpus = (
        format_text(template, *values)
        for template, values in (
            ("nodes {} and gpus {}", (nodes, gpus)),
            ("nodes {}", (nodes,)),
            ("gpus {}", (gpus,)),
        )
    )
    for stage in STAGES:
        key = f"{stage}.optimizer.gradientAccumulationSteps"
        yield CelRule(
            f"has(self.compute) && {NODES} * {GPUS} > 1 && {is_set(f'self.{key}')}",
            text(
                "{} is not supported with spec.compute.{}: Keras crashes when it accumulates gradients over several "
                "replicas (keras#20582). Remove it, or set {}.",
                f"string(self.{key})",
                f"({NODES} > 1 ? ({GPUS} > 1 ? {both} : {only_nodes}) : {only_gpus})",
                f'({NODES} > 1 ? ({GPUS} > 1 ? "nodes: 1 and gpus: 1" : "nodes: 1") : "gpus: 1")',
            ),
            key,
        )


@mirrors(job.fine_tune_learning_rate_is_not_higher)
def _learning_rates() -> Iterator[CelRule]:
    base, rate = "self.model.base", "self.fineTune.optimizer.learningRate"
    transfer = "self.transfer.optimizer.learningRate"
    pretrained = f'(has({base}.saved) || has({base}.application) && !(has({base}.weights) && {base}.weights == "none"))'
    # With unfreeze.steps, which CEL cannot read, epochs are not set, and each step has its own learning rate.
    same_optimizer = "has(self.fineTune.epochs) && self.transfer.optimizer.name == self.fineTune.optimizer.name"
    yield CelRule(
        f"{is_set(rate)} && {same_optimizer} && {pretrained} && {rate} > {transfer}",
        text(
            "{} is above spec.transfer.optimizer.learningRate {}. A higher learning rate destroys pretrained weights. "
            "Try a tenth of it, {}.",
            format_number(rate),
            format_number(transfer),
            format_number(f"({transfer} / 10.0)"),
        ),
        "fineTune.optimizer.learningRate",
    )


@mirrors(job.image_size_is_supported)
def _image_sizes() -> Iterator[CelRule]:
    application = "self.model.base.application"
    for minimum in sorted(set(MIN_SIDE.values())):
        names = [name for name, side in MIN_SIDE.items() if side == minimum]
        others = [name for name in MIN_SIDE if name not in names]
        applies = f"{application} in {any_of(names)}"
        if len(others) < len(names):
            applies = f"!({application} in {any_of(others)})"
        yield CelRule(
            f"has({application}) && {applies} && self.dataset.imageSize.exists(side, side < {minimum})",
            text(
                f"{{}} is too small for {{}}, which needs at least {minimum} pixels.",
                f"string(self.dataset.imageSize.filter(side, side < {minimum})[0])",
                application,
            ),
            "dataset.imageSize",
        )


@mirrors(job.storage_does_not_overlap_the_images)
def _storage() -> Iterator[CelRule]:
    storage, folder = "self.storage", "self.dataset.source.folder.uri"
    prefixes = [f'({uri}.endsWith("/") ? {uri} : {uri} + "/")' for uri in (storage, folder)]
    overlap = f"({prefixes[0]}.startsWith({prefixes[1]}) || {prefixes[1]}.startsWith({prefixes[0]}))"
    yield CelRule(
        f'has({storage}) && has(self.dataset.source.folder) && {folder}.startsWith("s3://") && {overlap}',
        text(
            "{} overlaps spec.dataset.source.folder.uri {}: each directory in the folder is a class, so runs and "
            "models must be stored elsewhere. Use prefixes of which neither contains the other, such as "
            "s3://bucket/topwork and s3://bucket/photos.",
            format_string(storage),
            format_string(folder),
        ),
        "storage",
    )


@mirrors(job.cnn_is_trained)
def _cnn() -> Iterator[CelRule]:
    yield CelRule(
        'self.transfer.train == "head" && has(self.model.base.cnn)',
        "head would freeze the cnn at its random weights. Set train: all.",
        "transfer.train",
    )


@mirrors(job.unpublished_model_is_measured_on_validation)
def _unpublished() -> Iterator[CelRule]:
    # CEL cannot read the splits, which the rule checks, too.
    gates = "size(self.evaluate.gates)"
    yield CelRule(
        f"!self.publish.enabled && {gates} > 0",
        text(
            "{} would never be checked, because publish.enabled is false. Remove the gates, or publish.enabled.",
            f'({gates} == 1 ? "1 gate" : {format_text("{} gates", f"string({gates})")})',
        ),
        "evaluate.gates",
        "FieldValueForbidden",
    )


@mirrors(compute.topology_requires_several_nodes)
def _topology() -> Iterator[CelRule]:
    # Without nodes, the defaults of the namespace may set it.
    yield CelRule(
        "has(self.topology) && has(self.nodes) && self.nodes == 1",
        "applies only to several nodes. Set spec.compute.nodes, or remove topology.",
        "topology",
        "FieldValueForbidden",
    )


@mirrors(compute.topology_does_not_contradict_itself)
def _topology_labels() -> Iterator[CelRule]:
    yield CelRule(
        "has(self.pack) && has(self.spread) && self.pack == self.spread",
        text("{} is also the label of pack. Remove one of them.", "self.spread"),
        "spread",
    )
