"""Tables as people read them, on a terminal or off it: words to the left, figures to the right, nothing cut off."""

from collections.abc import Iterator, Sequence


def lines(columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1, gap: int = 2) -> Iterator[str]:
    """Write a table.

    Args:
        columns: Headings.
        rows: A cell for each column.
        words: How many columns from the left hold words; the others hold figures.
        gap: Spaces between two columns.

    Yields:
        The lines, the headings first.
    """
    table = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [
            f"{cell:<{width}}" if index < words else f"{cell:>{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield (" " * gap).join(cells).rstrip()
