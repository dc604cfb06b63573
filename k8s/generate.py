"""`make generate`: writes the YAML files in k8s/; `make verify` checks that they are up to date."""

from collections.abc import Iterator
from pathlib import Path

import base
import controller
import examples
import overlays

HERE = Path(__file__).parent
DIRECTORIES = {"base": base, "controller": controller, "examples": examples, "overlays": overlays}


def main() -> None:
    """Write all files, and delete files that are no longer generated."""
    texts = dict(files())
    for path in HERE.rglob("*.yaml*"):
        if path not in texts:
            path.unlink()
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def files() -> Iterator[tuple[Path, str]]:
    """Yield the path and the content of each file."""
    for directory, module in DIRECTORIES.items():
        for name, text in module.files():
            yield HERE / directory / name, text


if __name__ == "__main__":
    main()
