"""Errors that interrupt a reconciliation without being a fault, and when it is tried again."""

from topwork.clients.kubernetes.errors import (
    ConflictError,
    NamespaceTerminatingError,
    NotFoundError,
    UidConflictError,
    UnknownApiError,
)

CHANGED_ERRORS = (NotFoundError, UidConflictError, ConflictError)
"""An object was changed, or deleted and created again, since it was read."""
GONE_ERRORS = (NamespaceTerminatingError, UnknownApiError)
"""The namespace or the kind is being deleted or gone. The watch reports a deleted CustomResourceDefinition."""
INTERRUPTIONS = (*CHANGED_ERRORS, *GONE_ERRORS)
"""Errors that end a reconciliation early, and are no fault of the object or of its spec."""
AGAIN_SECONDS = 1.0
"""Delay after an object was changed, or the journal of a search was continued, in the middle of a reconciliation."""
UNAVAILABLE_SECONDS = 60.0
"""Delay while the namespace or the kind is being deleted or gone."""
