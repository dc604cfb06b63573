"""CEL rules of a TransferSearch. Those of its template are the rules of a TransferJob."""

from collections.abc import Iterator

from topwork.cluster.definition.cel import CelRule, exactly_one_of, format_number, format_text, mirrors, text
from topwork.spec.schema.json_schema import EXACTLY_ONE
from topwork.spec.search import transfer_search


@mirrors(transfer_search.exactly_one_kind)
def _kind() -> Iterator[CelRule]:
    yield from exactly_one_of(EXACTLY_ONE[transfer_search.Parameter], unreadable=("choice",))


@mirrors(transfer_search.bounds_ascend)
def _bounds() -> Iterator[CelRule]:
    for kind in ("uniform", "logUniform", "int"):
        low, high = f"self.{kind}[0]", f"self.{kind}[1]"
        shown = [f"string({bound})" if kind == "int" else format_number(bound) for bound in (low, high)]
        yield CelRule(
            f"has(self.{kind}) && {low} >= {high}",
            text(
                "{} is not a range. Expected [smallest, largest] with the smallest value below the largest.",
                format_text("[{}, {}]", *shown),
            ),
            kind,
        )


@mirrors(transfer_search.metric_is_evaluated)
def _metric() -> Iterator[CelRule]:
    metrics = "self.template.evaluate.metrics"
    yield CelRule(
        f'self.metric != "loss" && !(self.metric in {metrics})',
        text(
            "{} is not in spec.template.evaluate.metrics: {}. Add it there, or use loss.",
            "self.metric",
            f'{metrics}.join(", ")',
        ),
        "metric",
    )


@mirrors(transfer_search.search_publishes_its_best_trial)
def _best_trial() -> Iterator[CelRule]:
    yield CelRule(
        "!self.template.publish.enabled",
        "must not be false: the search publishes only its best trial. Remove it.",
        "template.publish.enabled",
        "FieldValueForbidden",
    )
    yield CelRule(
        "self.template.suspend",
        "true would stop every trial. Set suspend of the search instead.",
        "template.suspend",
        "FieldValueForbidden",
    )


@mirrors(transfer_search.grid_is_finite)
def _grid() -> Iterator[CelRule]:
    yield CelRule(
        'self.sampler == "grid" && self.space.exists(name, has(self.space[name].uniform) || '
        "has(self.space[name].logUniform))",
        "has infinitely many values, but sampler grid tries all of them. Use choice or int, or another sampler.",
        "space",
    )
