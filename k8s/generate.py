"""`make generate`: write everything below k8s/ that kubectl reads; `make verify` proves it up to date."""

from collections.abc import Iterator
from pathlib import Path

import base
import examples
import overlays

HERE = Path(__file__).parent
PARTS = {"base": base, "examples": examples, "overlays": overlays}


def main() -> None:
    """Write all files, and remove those that are generated no more."""
    texts = dict(files())
    for path in HERE.rglob("*.yaml*"):
        if path not in texts:
            path.unlink()
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def files() -> Iterator[tuple[Path, str]]:
    """Give every file with its text."""
    for folder, part in PARTS.items():
        for name, text in part.files():
            yield HERE / folder / name, text


if __name__ == "__main__":
    main()
