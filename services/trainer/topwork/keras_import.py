"""Importing Keras without packages that it imports only for features that topwork does not use."""

import sys

# Keras imports them for its scikit-learn wrappers and image galleries, and works without them. They take a third of the
# import time of Keras and TensorFlow together.
UNUSED_PACKAGES = ("sklearn", "matplotlib")


def import_keras() -> None:
    """Import Keras and TensorFlow. The packages that are left out can still be imported afterwards."""
    left_out = [name for name in UNUSED_PACKAGES if name not in sys.modules]
    # An entry of None makes `import` raise ModuleNotFoundError.
    sys.modules.update(dict.fromkeys(left_out))  # type: ignore[arg-type]
    try:
        import keras  # noqa: F401
    finally:
        for name in left_out:
            del sys.modules[name]
