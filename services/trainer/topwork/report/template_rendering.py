"""Renders the templates of the reports."""

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_template(
    name: str, filters: Mapping[str, Callable[..., str]], variables: Mapping[str, Any], *, escape: bool = True
) -> str:
    """Render a template of `topwork/report/templates`.

    Args:
        name: File name of the template.
        filters: Filters that the template uses, by name.
        variables: Variables of the template. One that is missing is an error.
        escape: Whether to escape values for HTML; false only for Markdown, which has its own escaping.
    """
    environment = Environment(
        loader=PackageLoader("topwork.report"),
        autoescape=escape,  # noqa: S701
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name).render(variables)
