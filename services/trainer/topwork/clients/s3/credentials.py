"""Reloads credentials that a server rejected: a role, token or mounted file may have been rotated in the meantime."""

import threading
import time
from collections.abc import Callable
from typing import Any

from botocore import exceptions as boto
from botocore.credentials import RefreshableCredentials, create_credential_resolver

# Codes for credentials that are no longer valid, or not yet valid everywhere. New ones can arrive within seconds.
ROTATION_CODES = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "RequestExpired", "TokenRefreshRequired"}
)
# Delays before the source of the credentials is read again, one for each attempt of a request.
ROTATION_DELAYS_SECONDS = (0.5, 2.0, 4.0)
# For this time after a change, another request that used the previous credentials is repeated too.
RECENT_SECONDS = 30.0
# Credentials from these sources cannot change while the process runs.
FIXED_METHODS = frozenset({"env", "explicit"})

Loader = Callable[[], Any]


class ReloadableCredentials:
    """The credentials of a session, which can be read again from their source. Thread-safe.

    botocore reads `get_frozen_credentials` for each signature, so that every attempt of a request uses the newest ones.
    """

    def __init__(self, credentials: Any, load: Loader) -> None:
        """Wrap credentials.

        Args:
            credentials: Credentials of botocore.
            load: Reads the credentials again, from the beginning of botocore's chain of sources.
        """
        self._current, self._load = credentials, load
        self._lock = threading.Lock()
        self._last_change: float | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._current, name)

    def get_frozen_credentials(self) -> Any:
        """Return the current keys and token, after refreshing them if they expire soon.

        Raises:
            botocore.exceptions.CredentialRetrievalError: If a file with a token can't be read, for example because it
                is not mounted yet.
        """
        try:
            return self._current.get_frozen_credentials()
        except OSError as error:
            raise boto.CredentialRetrievalError(provider=self._current.method, error_msg=str(error)) from error

    @property
    def is_temporary(self) -> bool:
        """Whether the credentials expire and botocore refreshes them."""
        return isinstance(self._current, RefreshableCredentials)

    def reload(self) -> bool:
        """Read the credentials again after the server rejected them.

        Returns:
            Whether they have changed, now or a moment ago, so that it makes sense to repeat the request.
        """
        if self._current.method in FIXED_METHODS:
            return False
        with self._lock:
            try:
                fresh = self._load()
                has_changed = fresh is not None and _identity(fresh) != _identity(self._current)
            except (boto.BotoCoreError, boto.ClientError, OSError):
                # The source is unavailable. The response of the storage explains the failure better.
                return False
            if has_changed:
                self._current, self._last_change = fresh, time.monotonic()
            return self._last_change is not None and time.monotonic() - self._last_change < RECENT_SECONDS


class ReloadableProvider:
    """Provides the credentials of a botocore session as `ReloadableCredentials`."""

    def __init__(self, session: Any, create_session: Callable[[], Any]) -> None:
        """Create a provider.

        Args:
            session: Session that uses the credentials.
            create_session: Creates a session like it, without cached files and roles.
        """
        self._session, self._create_session = session, create_session

    def load_credentials(self) -> ReloadableCredentials | None:
        """Load the credentials from botocore's chain of sources; None if there are none."""
        credentials = create_credential_resolver(self._session).load_credentials()
        if credentials is None:
            return None
        return ReloadableCredentials(
            credentials, lambda: create_credential_resolver(self._create_session()).load_credentials()
        )


def retry_delay(credentials: Any, attempts: int, status: int, code: str) -> float | None:
    """Decide whether a rejected request is repeated with new credentials.

    Args:
        credentials: Credentials of the client.
        attempts: Number of attempts so far.
        status: HTTP status of the response.
        code: S3 error code of the response.

    Returns:
        Delay in seconds; None if the request is not repeated.
    """
    is_rejected = status in {401, 403} or code in ROTATION_CODES
    # The response to a HEAD request has no body, and an expired token has status 400.
    if not (is_rejected or (status, code) == (400, "400")) or not isinstance(credentials, ReloadableCredentials):
        return None
    if credentials.reload():
        return 0.0
    can_rotate = code in ROTATION_CODES and credentials.method not in FIXED_METHODS
    return ROTATION_DELAYS_SECONDS[attempts - 1] if can_rotate and attempts <= len(ROTATION_DELAYS_SECONDS) else None


def _identity(credentials: Any) -> tuple[str, str, str | None]:
    frozen = credentials.get_frozen_credentials()
    return frozen.access_key, frozen.secret_key, frozen.token
