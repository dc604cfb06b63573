"""`make generate`: write everything in the repository that is generated; `make verify` proves it up to date."""

from pathlib import Path

from topwork.spec.reference import reference_text
from topwork.spec.schema import schema_text


def generate(root: Path) -> None:
    """Write the JSON Schema and the reference of the spec below `root`."""
    (root / "schema" / "transferjob.schema.json").write_text(schema_text())
    (root / "docs" / "spec.md").write_text(reference_text())


if __name__ == "__main__":
    generate(Path.cwd())
