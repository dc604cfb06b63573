"""Transfers of artifacts to and from S3, compared with rclone on the same server.

    python benchmarks/transfers.py [--gib 4] [--objects 10000 100] [--rounds 3]

Uploads a directory of random files to the embedded S3 server and downloads it again: with topwork, as datasets and
models are stored (a manifest with a SHA-256 digest of each file, which the download verifies), and with `rclone copy`
in its default settings and with 16 parallel transfers. The programs take turns within a round, and a ratio compares two
of them in the same round, so that other load on the machine affects both: above 1, topwork is faster. The server runs
on the same machine and shares its processor. Requires rclone (on Debian or Ubuntu, apt-get install rclone).
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from topwork.artifacts import download_artifact, write_artifact
from topwork.clients.s3.storage import Storage, StorageSettings, create_bucket
from topwork.local.server import embedded_storage

BUCKET = "transfers"
RCLONE_OPTIONS = {"rclone": [], "rclone, 16 transfers": ["--transfers", "16", "--checkers", "16"]}
PROGRAMS = ("topwork", *RCLONE_OPTIONS)
BLOCK_BYTES = 1 << 20

Seconds = dict[tuple[str, str], list[float]]


def write_files(directory: Path, count: int, total_bytes: int) -> None:
    """Write random files of equal size into a directory tree, at most 1,000 in each directory."""
    size, block = total_bytes // count, os.urandom(BLOCK_BYTES)
    for number in range(count):
        path = directory / f"{number // 1000:03}" / f"{number:06}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(number.to_bytes(8, "big"))
            for start in range(8, size, BLOCK_BYTES):
                file.write(block[: size - start])


def run_rclone(settings: StorageSettings, options: list[str], source: str, target: str) -> None:
    """Run `rclone copy`; the remote `s3` is the embedded server."""
    environment = {
        "RCLONE_CONFIG": os.devnull,
        "RCLONE_CONFIG_S3_TYPE": "s3",
        "RCLONE_CONFIG_S3_PROVIDER": "Other",
        "RCLONE_CONFIG_S3_ENDPOINT": str(settings.endpoint_url),
        "RCLONE_CONFIG_S3_ACCESS_KEY_ID": str(settings.access_key),
        "RCLONE_CONFIG_S3_SECRET_ACCESS_KEY": str(settings.secret_key),
    }
    # rclone reads the AWS variables, too.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    subprocess.run(["rclone", "copy", *options, source, target], env=inherited | environment, check=True)


def transfers_of(
    program: str, storage: Storage, prefix: str, files: Path, download: Path
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return functions that upload and download the files with a program."""
    if program == "topwork":
        return partial(write_artifact, storage, prefix, files, {}), partial(
            download_artifact, storage, prefix, download
        )
    run = partial(run_rclone, storage.server.settings, RCLONE_OPTIONS[program])
    remote = f"s3:{BUCKET}/{prefix}"
    return partial(run, str(files), remote), partial(run, remote, str(download))


def measure_round(settings: StorageSettings, files: Path, download: Path, number: int, seconds: Seconds) -> None:
    """Upload and download the files once with each program, in an order that rotates from round to round."""
    storage = Storage(f"s3://{BUCKET}", settings)
    for program in PROGRAMS[number % len(PROGRAMS) :] + PROGRAMS[: number % len(PROGRAMS)]:
        prefix = f"round-{number}/{PROGRAMS.index(program)}"
        upload, fetch = transfers_of(program, storage, prefix, files, download)
        for direction, transfer in (("upload", upload), ("download", fetch)):
            start = time.perf_counter()
            transfer()
            seconds.setdefault((direction, program), []).append(time.perf_counter() - start)
        shutil.rmtree(download)
        storage.delete(stored.key for stored in list(storage.list(f"{prefix}/")))


def add_rows(table: Table, count: int, total_bytes: int, seconds: Seconds) -> None:
    """Add a row for each direction and program: throughput, and the ratios to topwork in the same round."""
    for (direction, program), values in seconds.items():
        ratios = [other / own for other, own in zip(values, seconds[direction, "topwork"], strict=True)]
        table.add_row(
            f"{count:,}",
            direction,
            program,
            f"{total_bytes / statistics.median(values) / 1e6:.0f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="total size in GiB")
    parser.add_argument("--objects", type=int, nargs="+", default=[10000, 100], help="number of files")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    total_bytes = int(options.gib * 2**30)
    table = Table("objects", "direction", "program", "MB/s", "seconds of the program / seconds of topwork")
    with tempfile.TemporaryDirectory() as directory, embedded_storage(Path(directory) / "state") as settings:
        create_bucket(settings, BUCKET)
        for count in options.objects:
            files, seconds = Path(directory) / f"files-{count}", Seconds()
            write_files(files, count, total_bytes)
            for number in range(options.rounds):
                measure_round(settings, files, Path(directory) / "download", number, seconds)
            shutil.rmtree(files)
            add_rows(table, count, total_bytes, seconds)
    Console().print(table)


if __name__ == "__main__":
    main()
