"""Renders the model card and the HTML report from their templates."""

import html
import re
from typing import Any

from markupsafe import Markup

from topwork.report.evaluation import ClassScores
from topwork.report.plots import plot_confusion_matrix, plot_history, plot_reliability
from topwork.report.results import Results, summarize
from topwork.report.template_rendering import render_template
from topwork.spec.yaml_output import dump_job

# A confusion matrix with more classes is drawn as an image, because a table would be unreadable. Above
# `evaluation.MAX_DENSE_CLASSES`, an image would be, too, and more of the most frequent confusions are listed.
MAX_TABLE_CLASSES = 16
MAX_CONFUSIONS = 12
MAX_CONFUSIONS_OF_MANY_CLASSES = 50
# With more classes, only those with the lowest F1 are listed. A browser needs seconds for a table of 20,000 rows.
MAX_LISTED_CLASSES = 200
MAX_REJECTED = 50


def render_report(results: Results) -> str:
    """Render the report as a single self-contained HTML file.

    Args:
        results: The results.

    Returns:
        HTML. Names of classes and files are untrusted and escaped.
    """
    before = results.calibration.before if results.calibration else None
    reliability = plot_reliability(results.evaluation.reliability, before.reliability if before else ())
    figures = {
        "curves": Markup(plot_history(results.history)),  # noqa: S704 - generated and escaped by matplotlib
        "reliability": Markup(reliability),  # noqa: S704
        "confusion": None,
    }
    matrix = results.evaluation.confusion
    if matrix is not None and len(matrix) > MAX_TABLE_CLASSES:
        figures["confusion"] = Markup(plot_confusion_matrix(matrix))  # noqa: S704
    return _render("report.html.j2", results, figures=figures, escape=True)


def render_model_card(results: Results) -> str:
    """Render the model card: description, metrics, provenance and usage.

    Args:
        results: The results.

    Returns:
        Markdown with YAML front matter, as used by model hubs.
    """
    return _render("card.md.j2", results, escape=False)


def top_confusions(results: Results) -> list[tuple[str, str, int, float]]:
    """List the most frequent confusions.

    Args:
        results: The results.

    Returns:
        True class, predicted class, number of images, and their share of the true class; most frequent first.
    """
    evaluation = results.evaluation
    limit = MAX_CONFUSIONS if evaluation.confusion is not None else MAX_CONFUSIONS_OF_MANY_CLASSES
    return [(c.true_class, c.predicted_class, c.images, c.share) for c in evaluation.confusions[:limit]]


def listed_classes(results: Results) -> list[ClassScores]:
    """Choose the classes that the tables show.

    Args:
        results: The results.

    Returns:
        All classes in their order, or of many classes, those with the lowest F1, lowest first; classes without images
        in the split come last.
    """
    scores = results.evaluation.per_class
    if len(scores) <= MAX_LISTED_CLASSES:
        return list(scores)
    return sorted(scores, key=lambda score: 2.0 if score.f1 is None else score.f1)[:MAX_LISTED_CLASSES]


def _render(template: str, results: Results, *, escape: bool, **variables: Any) -> str:
    variables |= {
        "results": results,
        "evaluation": results.evaluation,
        "job": results.job,
        "spec": dump_job(results.job),
        "confusions": top_confusions(results),
        "classes": listed_classes(results),
        "rejected": results.dataset.rejected[:MAX_REJECTED],
        "rejected_reasons": _count_rejection_reasons(results),
    }
    filters = {
        "md": _escape_markdown,
        "code": _escape_inline_code,
        "number": _format_number,
        "percent": _format_percent,
        "summarize": summarize,
    }
    return render_template(template, filters, variables, escape=escape)


def _count_rejection_reasons(results: Results) -> dict[str, int]:
    counts: dict[str, int] = {}
    for image in results.dataset.rejected:
        counts[image.reason] = counts.get(image.reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def _escape_markdown(text: object) -> str:
    """Escape text for Markdown, including table cells."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", html.escape(flat, quote=False))


def _escape_inline_code(text: object) -> str:
    """Escape text for inline code in Markdown, including table cells."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")


def _format_number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def _format_percent(value: float) -> str:
    return f"{100 * value:.1f} %"
