"""Read throughput of stored datasets: TFRecord with topwork's index compared with TFDS's `array_record` format.

    python benchmarks/records.py [--images 3000] [--rounds 9]

Both formats contain the same synthetic JPEG files of 20 to 50 KB, written by the same TFDS builder. Each reader returns
the bytes of the image files, sequentially or in random order, with one process, or with two processes that each read
half of the images. The readers take turns within a round, and a ratio compares two readers of the same round, so that
other load on the machine affects both. The last rows add JPEG decoding, as in training. Files are in the page cache
after the first round, which is not reported.
"""

import argparse
import io
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table

BATCH = 32
READERS = ("TFRecord and index", "array_record", "tfds.data_source")
MODES = tuple((order, processes) for order in ("sequential", "random") for processes in (1, 2))

Read = Callable[[np.ndarray], list[bytes]]


def jpeg_files(count: int) -> Iterator[bytes]:
    """Yield JPEG files of 20 to 50 KB: blurred noise, which compresses about as well as a photograph."""
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (600, 800, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(2))
    for _ in range(count):
        side = int(random.integers(330, 520))
        left, top = int(random.integers(0, 800 - side)), int(random.integers(0, 600 - side))
        file = io.BytesIO()
        noise.crop((left, top, left + side, top + side)).save(file, "JPEG", quality=92)
        yield file.getvalue()


def write_dataset(directory: Path, file_format: str, files: list[bytes]) -> Path:
    """Write the files as a stored dataset in one of TFDS's file formats."""
    import tensorflow_datasets as tfds

    from topwork.data.tfds_writer import StoredImages

    digest = "0" * 64
    examples = (
        (key, {"image": file, "label": key % 2, "name": f"{key}.jpg", "sha256": digest})
        for key, file in enumerate(files)
    )
    tfds.disable_progress_bar()
    builder = StoredImages(directory / file_format, ("cat", "dog"), {"train": examples})
    config = tfds.download.DownloadConfig(try_download_gcs=False, compute_stats="skip")
    builder.download_and_prepare(download_dir=directory, download_config=config, file_format=file_format)
    return Path(builder.data_dir)


def open_readers(tfrecord: Path, array_record: Path) -> dict[str, Read]:
    """Open the dataset in each way. Each reader takes positions and returns the bytes of the image files."""
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    from topwork.data.record_index import open_record_index

    index = open_record_index(tfrecord, ["train"])
    records = ArrayRecordDataSource([str(path) for path in sorted(array_record.glob("*.array_record*"))])
    source = tfds.builder_from_directory(array_record).as_data_source(
        split="train", decoders={"image": tfds.decode.SkipDecoding()}
    )

    def image_of(record: bytes) -> bytes:
        return tf.train.Example.FromString(record).features.feature["image"].bytes_list.value[0]

    return {
        READERS[0]: lambda positions: [index.read_image(int(position)) for position in positions],
        READERS[1]: lambda positions: [image_of(record) for record in records.__getitems__(positions.tolist())],
        READERS[2]: lambda positions: [example["image"] for example in source.__getitems__(positions.tolist())],
    }


def run_worker(
    options: argparse.Namespace, directories: tuple[Path, Path], barrier: Any, number: int, results: Any
) -> None:
    """Read in one process, synchronized with the other one, and report the seconds of each mode, round and reader."""
    readers = open_readers(*directories)
    for decode, (order, processes), round_number in product((False, True), MODES, range(options.rounds + 1)):
        positions = np.arange(options.images)
        if order == "random":
            positions = np.random.default_rng(round_number).permutation(options.images)
        share = np.array_split(positions, processes)[number] if number < processes else positions[:0]
        for name, read in readers.items():
            barrier.wait()
            start = time.perf_counter()
            read_all(read, share, decode=decode)
            seconds = time.perf_counter() - start
            barrier.wait()
            if round_number:
                results.put((decode, order, processes, name, round_number, seconds))


def read_all(read: Read, positions: np.ndarray, *, decode: bool) -> None:
    """Read the images at the given positions in batches, and decode them if requested."""
    import tensorflow as tf

    for first in range(0, len(positions), BATCH):
        for file in read(positions[first : first + BATCH]):
            if decode:
                tf.io.decode_jpeg(file)


def measure(options: argparse.Namespace, directories: tuple[Path, Path]) -> dict[tuple[Any, ...], list[float]]:
    """Measure images per second of all processes together, by (decode, order, processes, reader), a value per round."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.SimpleQueue()
    target = partial(run_worker, options, directories, barrier)
    workers = [context.Process(target=target, args=(number, results)) for number in (0, 1)]
    for worker in workers:
        worker.start()
    seconds: dict[tuple[Any, ...], dict[int, float]] = {}
    for _ in range(2 * 2 * len(MODES) * options.rounds * len(READERS)):
        *key, round_number, duration = results.get()
        rounds = seconds.setdefault(tuple(key), {})
        rounds[round_number] = max(duration, rounds.get(round_number, 0.0))
    for worker in workers:
        worker.join()
    return {key: [options.images / rounds[number] for number in sorted(rounds)] for key, rounds in seconds.items()}


def describe_cpu() -> str:
    """Describe the CPU: its model, cores and vector extensions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    entries = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {name.strip(): value.strip() for name, value in entries.items()}
    flags = fields.get("flags", "").split()
    vectors = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{fields.get('model name', 'unknown CPU')}, {multiprocessing.cpu_count()} cores, {', '.join(vectors)}"


def main() -> None:
    """Write both datasets, measure all modes and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        files = list(jpeg_files(options.images))
        sizes = [len(file) / 1000 for file in files]
        tfrecord, array_record = (write_dataset(directory, name, files) for name in ("tfrecord", "array_record"))
        rates = measure(options, (tfrecord, array_record))
    title = f"{options.images} JPEG files of {min(sizes):.0f} to {max(sizes):.0f} KB: images per second, median"
    table = Table(title=title, caption=f"Ratio: throughput relative to {READERS[0]}. {describe_cpu()}")
    for column in ("work", "order", "processes", *READERS, *(f"ratio {name}" for name in READERS[1:])):
        table.add_column(column, justify="right")
    for decode in (False, True):
        for order, processes in MODES:
            baseline, *others = (rates[decode, order, processes, name] for name in READERS)
            ratios = [statistics.median(np.divide(other, baseline)) for other in others]
            medians = (statistics.median(values) for values in (baseline, *others))
            row = ("read and decode" if decode else "read", order, str(processes))
            table.add_row(*row, *(f"{rate:,.0f}" for rate in medians), *(f"{ratio:.2f}" for ratio in ratios))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
