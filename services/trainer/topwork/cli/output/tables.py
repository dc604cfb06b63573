"""Plain-text tables: text columns are left-aligned, number columns right-aligned, nothing is truncated."""

from collections.abc import Iterator, Sequence


def format_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1, gap: int = 2
) -> Iterator[str]:
    r"""Format a table.

    Args:
        columns: Column headings.
        rows: One cell per column.
        text_columns: Number of left-aligned columns, from the left; the others are right-aligned.
        gap: Number of spaces between two columns.

    Yields:
        The lines, headings first.

    Example:
        >>> print("\n".join(format_table(("NAME", "SIZE"), [("cats", "10"), ("flowers", "8")])))
        NAME     SIZE
        cats       10
        flowers     8
    """
    table = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [
            f"{cell:<{width}}" if index < text_columns else f"{cell:>{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield (" " * gap).join(cells).rstrip()
