"""Memory stays flat as a dataset grows."""

import subprocess
import sys

import numpy as np
from PIL import Image

# Without storage: everything that grows with the images happens before the upload.
_SCRIPT = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
from topwork.data.decode_pool import Provers
from topwork.data.sources.folder import Folder
from topwork.data.tfds_writer import write_tfds
from topwork.spec.dataset import FolderSource
import tensorflow_datasets.core.shuffle as shuffle

if __name__ == "__main__":
    # TFDS keeps up to 1 GB of examples before it sorts them on disk: 2 MB here, for datasets of a few.
    shuffle.MAX_MEM_BUFFER_SIZE = 2 << 20
    for number, folder in enumerate(sys.argv[1:]):
        source = Folder(FolderSource(uri=folder), SimpleNamespace(storage=None))
        out = Path(folder + "-out")
        out.mkdir()
        with Provers(workers=1) as provers:
            _, tally = write_tfds(source, provers, out, lambda: None)
        print(tally.images, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_of_a_pull_does_not_grow_with_the_images(tmp_path):
    script = tmp_path / "pull.py"
    script.write_text(_SCRIPT)
    noise = np.random.default_rng(0).integers(0, 256, (130, 130, 3), dtype=np.uint8)
    for count in (100, 500):
        for index in range(count):
            path = tmp_path / str(count) / "ab"[index % 2] / f"{index}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(noise, index, axis=0)).save(path)
    folders = [str(tmp_path / "100"), str(tmp_path / "500")]
    done = subprocess.run([sys.executable, str(script), *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    few, many = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert (few[0], many[0]) == (100, 500)
    # 400 more images are 20 MB.
    assert many[1] - few[1] < 10, (few, many)
