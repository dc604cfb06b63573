"""What botocore raises, said in the sentence that a user needs: the other half of `edge.storage`."""

from collections.abc import Iterator
from contextlib import contextmanager

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from s3transfer.exceptions import RetriesExceededError

from topwork.errors import DamagedError, DataError, SettingError, TopworkError, UnavailableError

WRONG_KEY = "{endpoint} does not know the access key. Look at AWS_ACCESS_KEY_ID and AWS_PROFILE."
SESSION_OVER = "{endpoint} says that the session is over ({code}). Look at AWS_SESSION_TOKEN, or log in again."
WRONG_REGION = "{endpoint} is the wrong region for the bucket {bucket} ({code}: {said}). Set AWS_REGION."
FULL = (
    "{endpoint} has no room left for {target} ({code}: {said}). Delete what nobody needs (topwork gc STORAGE), or have "
    "the disk or the quota enlarged, then start again."
)
FAILED = "{endpoint} failed for {target} after all retries ({code}: {said}). Try again later."

# The request was damaged under way: all that topwork sends is whole and well formed.
DAMAGED = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "InvalidDigest",
        "MalformedXML",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
    }
)
# What an error code says to the user. A code that is not here is told by its HTTP status.
BY_CODE: dict[str, tuple[type[TopworkError], str]] = {
    "NoSuchBucket": (
        SettingError,
        "The bucket {bucket} does not exist at {endpoint}. Make it (aws s3 mb s3://{bucket} --endpoint-url {endpoint}) "
        "or correct the storage URI, AWS_ENDPOINT_URL or AWS_REGION.",
    ),
    "InvalidAccessKeyId": (SettingError, WRONG_KEY),
    "InvalidClientTokenId": (SettingError, WRONG_KEY),
    "UnrecognizedClientException": (SettingError, WRONG_KEY),
    "SignatureDoesNotMatch": (
        SettingError,
        "{endpoint} refused the signature. Look at AWS_SECRET_ACCESS_KEY and AWS_REGION.",
    ),
    "ExpiredToken": (SettingError, SESSION_OVER),
    "ExpiredTokenException": (SettingError, SESSION_OVER),
    "InvalidToken": (SettingError, SESSION_OVER),
    "RequestExpired": (SettingError, SESSION_OVER),
    "RequestTimeTooSkewed": (
        SettingError,
        "{endpoint} refused the time of the request. Set the clock of this machine.",
    ),
    "301": (SettingError, WRONG_REGION),
    "PermanentRedirect": (SettingError, WRONG_REGION),
    "AuthorizationHeaderMalformed": (SettingError, WRONG_REGION),
    "IllegalLocationConstraintException": (SettingError, WRONG_REGION),
    "404": (DataError, "{target} does not exist at {endpoint}."),
    "NoSuchKey": (DataError, "{target} does not exist at {endpoint}."),
    "InsufficientStorage": (UnavailableError, FULL),
    "XMinioStorageFull": (UnavailableError, FULL),
    # A limit of the user's own; nobody else makes room below it.
    "QuotaExceeded": (SettingError, FULL),
    # Too many requests, or two at once: the same request can succeed later.
    "ConditionalRequestConflict": (UnavailableError, FAILED),
    "OperationAborted": (UnavailableError, FAILED),
    "RequestTimeout": (UnavailableError, FAILED),
    "ThrottlingException": (UnavailableError, FAILED),
    **dict.fromkeys(DAMAGED, (UnavailableError, FAILED)),
}


class NoCredentials(SettingError):  # noqa: N818 - the name of what is missing
    """No credentials were found, or half of them."""


@contextmanager
def told(endpoint: str, bucket: str, target: str) -> Iterator[None]:
    """Turn errors of botocore into errors of topwork.

    Args:
        endpoint: URL that the requests go to.
        bucket: Bucket that they are about.
        target: What they are about, as an s3:// URI.

    Raises:
        NoCredentials: If there are none.
        SettingError: If the bucket is missing, or credentials, region or certificates are refused.
        DataError: If the object is missing.
        UnavailableError: If the server can't be reached or fails, after botocore's retries.
    """
    try:
        yield
    except boto.ClientError as error:
        raise refused(error, endpoint, bucket, target) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        raise NoCredentials(
            f"No credentials for {target}: expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a "
            f"service account with web identity, and found {_found(error)}. Set them for {endpoint}."
        ) from error
    except (boto.CredentialRetrievalError, boto.TokenRetrievalError, boto.UnauthorizedSSOTokenError) as error:
        # The agent or metadata service of a pod or node is a server like others: it can be down for a while.
        kind = UnavailableError if error.kwargs.get("provider") in {"container-role", "iam-role"} else SettingError
        raise kind(f"The credentials for {target} could not be fetched: {error}. Look at AWS_PROFILE.") from error
    except boto.InvalidConfigError as error:
        raise SettingError(f"The AWS variables or files can't be used for {target}: {error}") from error
    except boto.SSLError as error:
        if "CERTIFICATE" not in str(error).upper():
            raise _unreachable(endpoint, target, error) from error
        raise SettingError(
            f"The certificate of {endpoint} is not trusted ({error.kwargs.get('error', error)}). "
            "Point AWS_CA_BUNDLE to the file with its authority."
        ) from error
    except (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, RetriesExceededError) as error:
        raise _unreachable(endpoint, target, error) from error
    except (boto.FlexibleChecksumError, ResponseParserError) as error:
        raise DamagedError(f"{target} arrived damaged from {endpoint}: {error}. Try again.") from error
    except (boto.ParamValidationError, boto.EndpointResolutionError) as error:
        raise SettingError(f"{target} is not a valid address, or {endpoint} no endpoint: {error}") from error


def refused(error: boto.ClientError, endpoint: str, bucket: str, target: str) -> TopworkError:
    """Say what an answer with an error code means.

    Args:
        error: The answer.
        endpoint: URL that the request went to.
        bucket: Bucket that it was about.
        target: What it was about, as an s3:// URI.

    Returns:
        The error to raise.
    """
    kind, sentence = BY_CODE.get(code_of(error)) or _by_status(status_of(error))
    said = error.response.get("Error", {}).get("Message") or "no message"
    return kind(sentence.format(endpoint=endpoint, bucket=bucket, target=target, code=code_of(error), said=said))


def _by_status(status: int) -> tuple[type[TopworkError], str]:
    if status in {401, 403}:
        return SettingError, (
            "{endpoint} refused access to {target} ({code}: {said}). Look at AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, and at what they may do in the bucket {bucket}."
        )
    if status == 501:
        return SettingError, (
            "{endpoint} does not offer what was asked for {target} ({code}: {said}). "
            "topwork needs conditional writes (If-None-Match); for a server without checksum trailers set "
            "AWS_REQUEST_CHECKSUM_CALCULATION=when_required."
        )
    if status == 507:
        return UnavailableError, FULL
    if status >= 500 or status in {408, 429}:
        return UnavailableError, FAILED
    return SettingError, "{endpoint} refused the request for {target} ({code}: {said})."


def code_of(error: boto.ClientError) -> str:
    """Return the error code of an answer, such as NoSuchKey."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: boto.ClientError) -> int:
    """Return the HTTP status of an answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _found(error: Exception) -> str:
    if isinstance(error, boto.PartialCredentialsError):
        return f"them without {error.kwargs.get('cred_var', 'the other half')}"
    return "none of these"


def _unreachable(endpoint: str, target: str, error: Exception) -> UnavailableError:
    last = getattr(error, "last_exception", error)
    return UnavailableError(
        f"{endpoint} can't be reached for {target} after all retries ({last}). "
        "Look at AWS_ENDPOINT_URL and the network, or try again later."
    )
