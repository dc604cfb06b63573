"""ImageNet weights in storage: as Keras provides them, or converted from another framework.

Both are kept under different keys: versions of topwork that do not know converted weights must not read them, and
results that were trained from one must not be taken for results of the other.
"""

from topwork.clients.s3.objects import StoredObject
from topwork.clients.s3.storage import Storage


def mirrored_weights_key(name: str) -> str:
    """Return the storage key of the ImageNet weights of a model, as Keras provides them."""
    return f"weights/imagenet/{name}.weights.h5"


def converted_weights_key(name: str) -> str:
    """Return the storage key of ImageNet weights of a model that were converted from another framework."""
    return f"weights/imagenet/{name}.converted.weights.h5"


def find_converted_weights(name: str, storage: Storage) -> StoredObject | None:
    """Find converted ImageNet weights, which take precedence over those of Keras.

    Args:
        name: Name of the model.
        storage: Storage of the job.

    Returns:
        The object; None if there is none.
    """
    key = converted_weights_key(name)
    return next((stored for stored in storage.list(key) if stored.key == key), None)
