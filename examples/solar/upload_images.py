"""Upload the images and label tables of the solar examples to object storage.

    python examples/solar/upload_images.py                         to s3://topwork/solar, which the examples read
    python examples/solar/upload_images.py s3://my-bucket/solar    for examples with changed storage

Storage is configured as for `topwork run`: the AWS environment variables set the endpoint and credentials, and the
bucket must exist. Without these variables, the embedded server is used. Existing tables and their images are skipped.

The images come from the elpv-dataset package (Buerhop-Lutz et al. 2018, CC BY-NC-SA 4.0): 2,624 electroluminescence
images of solar cells, each labeled by experts with the probability that the cell is defective. The examples use only
images that the experts were certain about, with one table per type of cell.
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
PARALLEL_UPLOADS = 16


def read_labels() -> dict[str, list[tuple[str, str]]]:
    """Read the labels that the experts were certain about.

    Returns:
        For each type of cell, mono and poly, pairs of image path, relative to `DATA`, and condition.
    """
    rows: dict[str, list[tuple[str, str]]] = {"mono": [], "poly": []}
    for line in (DATA / "labels.csv").read_text().splitlines():
        image, probability, cell_type = line.split()
        if condition := CONDITIONS.get(float(probability)):
            rows[cell_type].append((image, condition))
    return rows


def upload_images(storage: Storage) -> dict[str, int]:
    """Upload images, and the tables `pictures/mono.csv` and `pictures/poly.csv` with the columns path and condition.

    Args:
        storage: Storage of the examples.

    Returns:
        The number of images in each table.
    """
    rows = read_labels()
    for cell_type, labels in rows.items():
        table, key = to_csv(labels), f"pictures/{cell_type}.csv"
        if storage.read(key) == table:
            continue
        with ThreadPoolExecutor(PARALLEL_UPLOADS) as pool:
            for _ in pool.map(lambda label: upload_image(storage, label[0]), labels):
                pass
        # The table is written last, so that an existing table lists only existing images.
        storage.write(key, table, content_type="text/csv")
    return {cell_type: len(labels) for cell_type, labels in rows.items()}


def to_csv(labels: list[tuple[str, str]]) -> bytes:
    """Write labels as CSV."""
    text = io.StringIO()
    csv.writer(text).writerows([("path", "condition"), *labels])
    return text.getvalue().encode()


def upload_image(storage: Storage, image: str) -> None:
    """Upload one image."""
    storage.write(f"pictures/{image}", (DATA / image).read_bytes(), content_type="image/png")


def main() -> None:
    """Upload to the storage given on the command line."""
    uri = sys.argv[1] if len(sys.argv) > 1 else STORAGE
    with open_storage(uri) as storage:
        for cell_type, count in upload_images(storage).items():
            print(f"{uri}/pictures/{cell_type}.csv: {count} images")


if __name__ == "__main__":
    main()
