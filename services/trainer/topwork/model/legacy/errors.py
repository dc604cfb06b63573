"""The error for a part of a Keras 2 model that Keras 3 cannot compute."""


class UpgradeError(Exception):
    """A layer of Keras 2 has no equivalent in Keras 3. The message is a clause that starts with the layer."""
