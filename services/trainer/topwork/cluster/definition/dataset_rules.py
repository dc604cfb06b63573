"""CEL rules of the dataset, the evaluation and the resources."""

from collections.abc import Iterator

from topwork.cluster.definition.cel import CelRule, exactly_one_of, format_number, format_string, mirrors, text
from topwork.spec import compute, dataset, evaluation
from topwork.spec.schema.json_schema import EXACTLY_ONE


@mirrors(dataset.exactly_one_source)
def _source() -> Iterator[CelRule]:
    yield from exactly_one_of(EXACTLY_ONE[dataset.DatasetSource])


@mirrors(dataset.root_is_inside_the_archive)
def _archive() -> Iterator[CelRule]:
    yield CelRule(
        r'self.root.matches("(^|/)[.][.](/|$)")',
        text("{} is outside the archive. Remove the .. segments.", format_string("self.root")),
        "root",
    )


@mirrors(dataset.columns_are_different)
def _table() -> Iterator[CelRule]:
    for key, other, content in (("split", "image", "split"), ("split", "label", "split"), ("label", "image", "class")):
        yield CelRule(
            f"has(self.{key}) && self.{key} == self.{other}",
            text(
                f"{{}} is also set as spec.dataset.source.table.{other}. Name the column with the {content}.",
                format_string(f"self.{key}"),
            ),
            key,
        )


@mirrors(evaluation.gate_has_a_condition)
def _gate() -> Iterator[CelRule]:
    yield CelRule(
        "!has(self.atLeast) && !has(self.atMost) && !has(self.atLeastLatestMinus) && !has(self.notWorseThanLatest)",
        "has no condition. Set at least one of atLeast, atMost, atLeastLatestMinus and notWorseThanLatest.",
    )


@mirrors(evaluation.gate_can_be_met)
def _gate_range() -> Iterator[CelRule]:
    yield CelRule(
        "has(self.atLeast) && has(self.atMost) && self.atLeast > self.atMost",
        text(
            "{} is below atLeast {}, so no model can meet both. Swap or change them.",
            format_number("self.atMost"),
            format_number("self.atLeast"),
        ),
        "atMost",
    )


@mirrors(evaluation.calibration_error_has_only_a_maximum)
def _calibration_error() -> Iterator[CelRule]:
    for key in ("atLeast", "atLeastLatestMinus"):
        yield CelRule(
            f'self.metric == "calibrationError" && has(self.{key})',
            text("{} requires a high calibrationError, but lower is better. Use atMost.", format_number(f"self.{key}")),
            key,
            "FieldValueForbidden",
        )


@mirrors(evaluation.gate_metrics_are_computed)
def _gate_metrics() -> Iterator[CelRule]:
    missing = "self.gates.filter(gate, !(gate.metric in self.metrics))"
    yield CelRule(
        f"size({missing}) > 0",
        text(
            "{} is not in spec.evaluate.metrics: {}. Add it there.",
            f"{missing}[0].metric",
            'self.metrics.join(", ")',
        ),
        "gates",
    )


@mirrors(evaluation.metrics_are_unique)
def _metrics() -> Iterator[CelRule]:
    yield from _unique("metrics")


@mirrors(evaluation.formats_are_unique)
def _formats() -> Iterator[CelRule]:
    yield from _unique("formats")


def _unique(key: str) -> Iterator[CelRule]:
    repeated = f"self.{key}.filter(item, !self.{key}.exists_one(other, other == item))"
    yield CelRule(
        f"size({repeated}) > 0",
        text("{} is listed twice. Remove one of them.", f"{repeated}[0]"),
        key,
    )


@mirrors(compute.shared_memory_is_below_memory)
def _memory() -> Iterator[CelRule]:
    yield CelRule(
        "has(self.sharedMemory) && has(self.memory) && "
        "quantity(self.sharedMemory).compareTo(quantity(self.memory)) >= 0",
        text(
            "{} is not below spec.compute.memory {}, which includes it. Raise memory or lower sharedMemory.",
            "self.sharedMemory",
            "self.memory",
        ),
        "sharedMemory",
    )


@mirrors(compute.toleration_fields_are_consistent)
def _tolerations() -> Iterator[CelRule]:
    exists = 'has(item.operator) && item.operator == "Exists"'
    problems = [
        (
            f"{exists} && has(item.value) && size(item.value) > 0",
            "cannot be combined with operator Exists. Remove one of them.",
        ),
        (
            'has(item.tolerationSeconds) && !(has(item.effect) && item.effect == "NoExecute")',
            "applies only to effect NoExecute. Remove it, or change the effect.",
        ),
        (
            f"!(has(item.key) && size(item.key) > 0) && !({exists})",
            "has no key. Set the key of the taint, or tolerate all taints with operator: Exists.",
        ),
    ]
    for condition, message in problems:
        yield CelRule(f"has(self.tolerations) && self.tolerations.exists(item, {condition})", message, "tolerations")
