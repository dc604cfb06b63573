"""Memory use of a pull does not grow with the dataset."""

import subprocess
import sys

import numpy as np
from PIL import Image

# Runs without storage: only the steps before the upload could use memory in proportion to the images.
_SCRIPT = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
from topwork.data.images.decode_pool import DecodePool
from topwork.data.sources.folder import ImageFolder
from topwork.data.tfds_writer import write_tfds
from topwork.spec.dataset import FolderSource
import tensorflow_datasets.core.shuffle as shuffle

if __name__ == "__main__":
    # TFDS buffers up to 1 GB of examples before it shuffles on disk. 2 MB is enough for these small datasets.
    shuffle.MAX_MEM_BUFFER_SIZE = 2 << 20
    for directory in sys.argv[1:]:
        source = ImageFolder(FolderSource(uri=directory), SimpleNamespace(storage=None))
        out = Path(directory + "-out")
        out.mkdir()
        with DecodePool(workers=1) as pool:
            _, stats = write_tfds(source, pool, out, lambda: None)
        print(stats.images, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_write_tfds_uses_constant_memory(tmp_path):
    script = tmp_path / "pull.py"
    script.write_text(_SCRIPT)
    noise = np.random.default_rng(0).integers(0, 256, (130, 130, 3), dtype=np.uint8)
    for count in (100, 500):
        for index in range(count):
            path = tmp_path / str(count) / "ab"[index % 2] / f"{index}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(noise, index, axis=0)).save(path)
    directories = [str(tmp_path / "100"), str(tmp_path / "500")]
    completed = subprocess.run([sys.executable, str(script), *directories], capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    few, many = (tuple(map(int, line.split())) for line in completed.stdout.splitlines())
    assert (few[0], many[0]) == (100, 500)
    # The additional 400 images take 20 MB.
    assert many[1] - few[1] < 10, (few, many)
