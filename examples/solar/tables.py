"""Write the tables of the solar examples: which picture shows a sound cell, and which a defective one.

The pictures are those of the elpv-dataset package (Buerhop-Lutz et al. 2018, CC BY-NC-SA 4.0): 2,624
electroluminescence images of solar cells, each labelled by experts with the probability that it is defective. The
examples take those that the experts were sure of, one table for each kind of cell.
"""

import csv
from importlib import resources
from pathlib import Path

FOLDER = Path("build/solar")
CONDITIONS = {0.0: "sound", 1.0: "defective"}


def write_tables(folder: Path = FOLDER) -> dict[str, int]:
    """Write `mono.csv` and `poly.csv` with the columns path and condition, beside a link to the pictures.

    Args:
        folder: Where the tables are written.

    Returns:
        How many pictures each table names.
    """
    data = Path(str(resources.files("elpv_dataset"))) / "data"
    rows: dict[str, list[tuple[str, str]]] = {"mono": [], "poly": []}
    for line in (data / "labels.csv").read_text().splitlines():
        picture, probability, kind = line.split()
        if condition := CONDITIONS.get(float(probability)):
            rows[kind].append((picture, condition))
    folder.mkdir(parents=True, exist_ok=True)
    pictures = folder / "images"
    pictures.unlink(missing_ok=True)
    pictures.symlink_to(data / "images")
    for kind, named in rows.items():
        with (folder / f"{kind}.csv").open("w", newline="") as table:
            csv.writer(table).writerows([("path", "condition"), *named])
    return {kind: len(named) for kind, named in rows.items()}


if __name__ == "__main__":
    print(", ".join(f"{FOLDER}/{kind}.csv: {count} pictures" for kind, count in write_tables().items()))
