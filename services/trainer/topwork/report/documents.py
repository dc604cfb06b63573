"""The model card and the HTML report, from their templates."""

import html
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from topwork.report.plots import confusion_picture, curves, reliability_diagram
from topwork.report.results import Outcome, told
from topwork.spec.yaml_output import dump_job

# A confusion matrix of more classes than this is drawn as a picture: as a table nobody could read it.
MOST_CLASSES_IN_A_TABLE = 16
MOST_CONFUSIONS = 12
MOST_REJECTED = 50


def report_html(outcome: Outcome) -> str:
    """Write the report: one HTML file that needs nothing beside it.

    Args:
        outcome: What is told.

    Returns:
        HTML. Names of classes and files are strangers' text and are escaped.
    """
    figures = {
        "curves": Markup(curves(outcome.history)),  # noqa: S704 - our own drawing, escaped by matplotlib
        "reliability": Markup(reliability_diagram(outcome.evaluation.reliability)),  # noqa: S704
        "confusion": None,
    }
    if len(outcome.evaluation.class_names) > MOST_CLASSES_IN_A_TABLE:
        figures["confusion"] = Markup(confusion_picture(outcome.evaluation.confusion))  # noqa: S704
    return _render("report.html.j2", outcome, figures=figures, escape=True)


def card_md(outcome: Outcome) -> str:
    """Write the model card: what the model is, how good it is, what it was made from, how to load it.

    Args:
        outcome: What is told.

    Returns:
        Markdown with a YAML head, as model hubs read it.
    """
    return _render("card.md.j2", outcome, escape=False)


def confusions(outcome: Outcome) -> list[tuple[str, str, int, float]]:
    """List what is taken for what most often.

    Args:
        outcome: What is told.

    Returns:
        True class, predicted class, images, and their share of the true class; the most frequent first.
    """
    evaluation = outcome.evaluation
    found = [
        (true, predicted, count, count / sum(row))
        for true, row in zip(evaluation.class_names, evaluation.confusion, strict=True)
        for predicted, count in zip(evaluation.class_names, row, strict=True)
        if count and true != predicted
    ]
    return sorted(found, key=lambda entry: (-entry[2], -entry[3], entry[:2]))[:MOST_CONFUSIONS]


def _render(template: str, outcome: Outcome, *, escape: bool, **more: Any) -> str:
    environment = Environment(
        loader=PackageLoader("topwork.report"),
        autoescape=escape,  # noqa: S701 - off for Markdown alone, which has an escape of its own
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(md=_markdown_text, code=_code_text, number=_number, percent=_percent, told=told)
    return environment.get_template(template).render(
        outcome=outcome,
        evaluation=outcome.evaluation,
        job=outcome.job,
        spec=dump_job(outcome.job),
        confusions=confusions(outcome),
        rejected=outcome.facts.rejected[:MOST_REJECTED],
        rejected_reasons=_reasons(outcome),
        **more,
    )


def _reasons(outcome: Outcome) -> dict[str, int]:
    found: dict[str, int] = {}
    for image in outcome.facts.rejected:
        found[image.reason] = found.get(image.reason, 0) + 1
    return dict(sorted(found.items(), key=lambda entry: (-entry[1], entry[0])))


def _markdown_text(text: object) -> str:
    """Make text stand in Markdown, and in a cell of its tables, as it is."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", html.escape(flat, quote=False))


def _code_text(text: object) -> str:
    """Make text stand between back-ticks, and in a cell of a table, as it is."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
