"""Importing Keras without packages that topwork does not use."""

import subprocess
import sys

SCRIPT = """
import sys
from topwork.keras_import import UNUSED_PACKAGES, import_keras
import_keras()
print(sorted({"keras", "tensorflow", *UNUSED_PACKAGES} & {*sys.modules}))
import sklearn.metrics, matplotlib.pyplot
import keras
print(keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)]).count_params())
import_keras()
print(sklearn.metrics is sys.modules["sklearn.metrics"])
"""


def test_unused_packages_are_not_imported_and_can_be_imported_later() -> None:
    completed = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.splitlines() == ["['keras', 'tensorflow']", "9", "True"]
