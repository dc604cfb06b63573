"""`make generate`: write everything in charts/topwork that is generated; `make verify` proves it up to date."""

from collections.abc import Iterator
from pathlib import Path

import chart
import dashboards

HERE = Path(__file__).parent / "topwork"


def main() -> None:
    """Write all files, and remove dashboards that are generated no more."""
    texts = dict(files())
    for path in (HERE / "dashboards").glob("*.json"):
        if path not in texts:
            path.unlink()
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def files() -> Iterator[tuple[Path, str]]:
    """Give every file with its text."""
    for part in (chart, dashboards):
        for name, text in part.files():
            yield HERE / name, text


if __name__ == "__main__":
    main()
