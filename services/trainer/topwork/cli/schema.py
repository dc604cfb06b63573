"""`topwork schema`: the JSON Schema of the job spec, for editors and other tools."""

import sys


def schema() -> None:
    """Print the JSON Schema of the job spec."""
    from topwork.spec.schema import schema_text

    sys.stdout.write(schema_text())
