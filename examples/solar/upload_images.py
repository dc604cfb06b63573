"""Put the pictures of the solar examples into object storage, with the tables that say which cell is sound.

    python examples/solar/pictures.py                         to s3://topwork/solar, where the examples look for them
    python examples/solar/pictures.py s3://my-bucket/solar    for examples whose storage was changed to that

Storage is found as `topwork run` finds it: the AWS variables say where, and the bucket exists; without them it is the
embedded server. What is there already is not sent again.

The pictures are those of the elpv-dataset package (Buerhop-Lutz et al. 2018, CC BY-NC-SA 4.0): 2,624
electroluminescence images of solar cells, each labelled by experts with the probability that it is defective. The
examples take those that the experts were sure of, one table for each kind of cell.
"""

import csv
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

from topwork.cli.runtime.storage import open_storage
from topwork.clients.s3.storage import Storage

STORAGE = "s3://topwork/solar"
DATA = Path(str(resources.files("elpv_dataset"))) / "data"
CONDITIONS = {0.0: "sound", 1.0: "defective"}
PARALLEL = 16


def labelled() -> dict[str, list[tuple[str, str]]]:
    """Read which pictures the experts were sure of.

    Returns:
        Pairs of a picture, relative to `DATA`, and its condition, for the kinds of cell mono and poly.
    """
    rows: dict[str, list[tuple[str, str]]] = {"mono": [], "poly": []}
    for line in (DATA / "labels.csv").read_text().splitlines():
        picture, probability, kind = line.split()
        if condition := CONDITIONS.get(float(probability)):
            rows[kind].append((picture, condition))
    return rows


def write_pictures(storage: Storage) -> dict[str, int]:
    """Write `pictures/mono.csv` and `pictures/poly.csv` with the columns path and condition, beside the pictures.

    Args:
        storage: Storage of the examples.

    Returns:
        How many pictures each table names.
    """
    rows = labelled()
    for kind, named in rows.items():
        table, key = table_of(named), f"pictures/{kind}.csv"
        if storage.read(key) == table:
            continue
        with ThreadPoolExecutor(PARALLEL) as pool:
            for _ in pool.map(lambda row: send(storage, row[0]), named):
                pass
        # Last: a table that is there names pictures that are there.
        storage.write(key, table, content_type="text/csv")
    return {kind: len(named) for kind, named in rows.items()}


def table_of(named: list[tuple[str, str]]) -> bytes:
    """Write the rows as CSV."""
    text = io.StringIO()
    csv.writer(text).writerows([("path", "condition"), *named])
    return text.getvalue().encode()


def send(storage: Storage, picture: str) -> None:
    """Store one picture."""
    storage.write(f"pictures/{picture}", (DATA / picture).read_bytes(), content_type="image/png")


def main() -> None:
    """Write to the storage that the command line names."""
    uri = sys.argv[1] if len(sys.argv) > 1 else STORAGE
    with open_storage(uri) as storage:
        for kind, count in write_pictures(storage).items():
            print(f"{uri}/pictures/{kind}.csv: {count} pictures")


if __name__ == "__main__":
    main()
