"""Why an image is rejected. Does not import an image library, so that sources can be listed without one."""

from topwork.redaction import redact

MAX_BYTES = 64 * 2**20
"""Maximum size of an encoded image, in bytes."""

EMPTY = "empty"
TOO_LARGE = "too large"
UNKNOWN_FORMAT = "unknown format"
TRUNCATED = "truncated"
UNDECODABLE = "undecodable"
CRASHED = "decoder crashed"
HUNG = "decoder hung"
MISSING = "missing"
NO_LABEL = "no label"
UNSAFE = "unsafe member"
REASONS = (EMPTY, TOO_LARGE, UNKNOWN_FORMAT, TRUNCATED, UNDECODABLE, CRASHED, HUNG, MISSING, NO_LABEL, UNSAFE)
"""Why an image is rejected: all values of the label `reason` of topwork_images_rejected_total."""


class Rejection(Exception):  # noqa: N818 - a result, not a program error
    """An image is rejected.

    Attributes:
        reason: One of `REASONS`.
        detail: Error message of the decoder or the source.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        # The message of a decoder or server is stored, and it may contain credentials.
        detail = redact(detail)
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
