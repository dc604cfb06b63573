"""`make generate`: writes the generated files in charts/topwork; `make verify` checks that they are up to date."""

from collections.abc import Iterator
from pathlib import Path

import chart
import dashboards

HERE = Path(__file__).parent / "topwork"


def main() -> None:
    """Write all files, and delete dashboards that are no longer generated."""
    texts = dict(files())
    for path in (HERE / "dashboards").glob("*.json"):
        if path not in texts:
            path.unlink()
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def files() -> Iterator[tuple[Path, str]]:
    """Yield the path and the content of each file."""
    for part in (chart, dashboards):
        for name, text in part.files():
            yield HERE / name, text


if __name__ == "__main__":
    main()
