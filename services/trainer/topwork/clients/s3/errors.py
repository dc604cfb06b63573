"""Translates botocore exceptions into errors that tell the user what to fix."""

from collections.abc import Iterator
from contextlib import contextmanager

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from s3transfer.exceptions import RetriesExceededError

from topwork.errors import DamagedError, DataError, SettingError, TopworkError, UnavailableError

UNKNOWN_KEY = "{endpoint} does not know the access key. Check AWS_ACCESS_KEY_ID and AWS_PROFILE."
EXPIRED_SESSION = "{endpoint} reports an expired session ({code}). Check AWS_SESSION_TOKEN, or log in again."
DENIED = (
    "{endpoint} denied access to {target} ({code}: {message}). Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
    "AWS_PROFILE, and their permissions on the bucket {bucket}."
)
WRONG_REGION = "{endpoint} is in the wrong region for the bucket {bucket} ({code}: {message}). Set AWS_REGION."
STORAGE_FULL = (
    "{endpoint} has no space left for {target} ({code}: {message}). Delete data that is no longer needed (topwork gc "
    "STORAGE) or increase the disk or quota, then start again."
)
FAILED = "{endpoint} failed for {target} after all retries ({code}: {message}). Try again later."

# These codes mean damage in transit, because topwork sends only complete and well-formed requests.
DAMAGED_REQUEST_CODES = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "InvalidDigest",
        "MalformedXML",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
    }
)
# Sources of credentials in a pod or node: their service or mounted token can be temporarily unavailable.
CLUSTER_PROVIDERS = frozenset({"container-role", "iam-role", "assume-role-with-web-identity"})
# Request Timeout, Too Early, Too Many Requests, and Temporary Redirect.
TEMPORARY_STATUSES = frozenset({307, 408, 425, 429})


class NoCredentialsError(SettingError):
    """No credentials, or incomplete credentials, were found."""


class AccessError(UnavailableError):
    """Storage rejected the credentials or their permissions.

    Not a `SettingError`: keys are rotated, permissions take effect with a delay, mounted tokens are updated, and the
    clock of another node may be right. The Job bounds the number of retries.
    """


# Error type and message for each S3 error code. Other codes are mapped by HTTP status.
ERRORS_BY_CODE: dict[str, tuple[type[TopworkError], str]] = {
    "NoSuchBucket": (
        SettingError,
        "The bucket {bucket} does not exist at {endpoint}. Create it (aws s3 mb s3://{bucket} --endpoint-url "
        "{endpoint}) or correct the storage URI, AWS_ENDPOINT_URL or AWS_REGION.",
    ),
    "InvalidAccessKeyId": (AccessError, UNKNOWN_KEY),
    "InvalidClientTokenId": (AccessError, UNKNOWN_KEY),
    "UnrecognizedClientException": (AccessError, UNKNOWN_KEY),
    "TokenRefreshRequired": (AccessError, EXPIRED_SESSION),
    "SignatureDoesNotMatch": (
        AccessError,
        "{endpoint} rejected the request signature. Check AWS_SECRET_ACCESS_KEY and AWS_REGION.",
    ),
    "ExpiredToken": (AccessError, EXPIRED_SESSION),
    "ExpiredTokenException": (AccessError, EXPIRED_SESSION),
    "InvalidToken": (AccessError, EXPIRED_SESSION),
    "RequestExpired": (AccessError, EXPIRED_SESSION),
    "RequestTimeTooSkewed": (
        AccessError,
        "{endpoint} rejected the time of the request. Set the clock of this machine.",
    ),
    "301": (SettingError, WRONG_REGION),
    "PermanentRedirect": (SettingError, WRONG_REGION),
    "AuthorizationHeaderMalformed": (SettingError, WRONG_REGION),
    "IllegalLocationConstraintException": (SettingError, WRONG_REGION),
    # Responses of the service that exchanges the token of a service account.
    "InvalidIdentityToken": (AccessError, DENIED),
    "IDPRejectedClaim": (AccessError, DENIED),
    "IDPCommunicationError": (UnavailableError, FAILED),
    # While DNS does not know a new bucket yet.
    "TemporaryRedirect": (UnavailableError, FAILED),
    "404": (DataError, "{target} does not exist at {endpoint}."),
    "NoSuchKey": (DataError, "{target} does not exist at {endpoint}."),
    "InsufficientStorage": (UnavailableError, STORAGE_FULL),
    "XMinioStorageFull": (UnavailableError, STORAGE_FULL),
    # A quota does not change by itself, so retrying is useless.
    "QuotaExceeded": (SettingError, STORAGE_FULL),
    # Too many requests, or two conflicting ones: the same request can succeed later.
    "ConditionalRequestConflict": (UnavailableError, FAILED),
    "OperationAborted": (UnavailableError, FAILED),
    "RequestTimeout": (UnavailableError, FAILED),
    "ThrottlingException": (UnavailableError, FAILED),
    **dict.fromkeys(DAMAGED_REQUEST_CODES, (UnavailableError, FAILED)),
}


@contextmanager
def translate_errors(endpoint: str, bucket: str, target: str) -> Iterator[None]:
    """Translate botocore exceptions into errors of topwork.

    Args:
        endpoint: URL of the server.
        bucket: Bucket of the requests.
        target: Subject of the requests, usually an s3:// URI, for error messages.

    Raises:
        NoCredentialsError: If credentials are missing or incomplete.
        AccessError: If the credentials are rejected.
        SettingError: If the bucket does not exist, or the region or certificate is rejected.
        DataError: If the object does not exist.
        UnavailableError: If the server can't be reached or fails, after botocore's retries.
    """
    try:
        yield
    except boto.ClientError as error:
        raise error_from_response(error, endpoint, bucket, target) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        raise NoCredentialsError(
            f"No credentials for {target}: expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a "
            f"service account with web identity, but found {_found_credentials(error)}. Set the credentials for "
            f"{endpoint}."
        ) from error
    except (boto.CredentialRetrievalError, boto.TokenRetrievalError, boto.UnauthorizedSSOTokenError) as error:
        kind = UnavailableError if error.kwargs.get("provider") in CLUSTER_PROVIDERS else SettingError
        raise kind(f"The credentials for {target} could not be retrieved: {error}. Check AWS_PROFILE.") from error
    except boto.InvalidConfigError as error:
        raise SettingError(f"The AWS variables or files for {target} are invalid: {error}") from error
    except boto.SSLError as error:
        if "CERTIFICATE" not in str(error).upper():
            raise _unreachable(endpoint, target, error) from error
        raise SettingError(
            f"The certificate of {endpoint} is not trusted ({error.kwargs.get('error', error)}). "
            "Set AWS_CA_BUNDLE to the file that contains its certificate authority."
        ) from error
    except (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, RetriesExceededError) as error:
        raise _unreachable(endpoint, target, error) from error
    except (boto.FlexibleChecksumError, ResponseParserError) as error:
        raise DamagedError(f"{target} was damaged in transit from {endpoint}: {error}. Try again.") from error
    except (boto.ParamValidationError, boto.EndpointResolutionError) as error:
        raise SettingError(f"{target} is not a valid URI, or {endpoint} is not an S3 endpoint: {error}") from error


def error_from_response(error: boto.ClientError, endpoint: str, bucket: str, target: str) -> TopworkError:
    """Create the error for a response with an S3 error code.

    Args:
        error: The botocore exception that contains the response.
        endpoint: URL of the server.
        bucket: Bucket of the request.
        target: Subject of the request, usually an s3:// URI, for the error message.

    Returns:
        The error to raise.
    """
    kind, template = ERRORS_BY_CODE.get(error_code(error)) or _by_status(http_status(error))
    message = error.response.get("Error", {}).get("Message") or "no message"
    return kind(
        template.format(endpoint=endpoint, bucket=bucket, target=target, code=error_code(error), message=message)
    )


def _by_status(status: int) -> tuple[type[TopworkError], str]:
    if status in {401, 403}:
        return AccessError, DENIED
    if status == 501:
        return SettingError, (
            "{endpoint} does not support the request for {target} ({code}: {message}). "
            "topwork needs conditional writes (If-None-Match). For a server without checksum trailers, set "
            "AWS_REQUEST_CHECKSUM_CALCULATION=when_required."
        )
    if status == 507:
        return UnavailableError, STORAGE_FULL
    if status >= 500 or status in TEMPORARY_STATUSES:
        return UnavailableError, FAILED
    return SettingError, "{endpoint} rejected the request for {target} ({code}: {message})."


def is_temporary_status(status: int) -> bool:
    """Return whether a request can succeed later without any change, judging by its HTTP status.

    A full disk (507) is not temporary: it is not worth an immediate retry.
    """
    return status in TEMPORARY_STATUSES or (status >= 500 and status not in {501, 505, 507})


def error_code(error: boto.ClientError) -> str:
    """Return the S3 error code of a response, such as NoSuchKey."""
    return str(error.response.get("Error", {}).get("Code", ""))


def http_status(error: boto.ClientError) -> int:
    """Return the HTTP status of a response."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _found_credentials(error: Exception) -> str:
    if isinstance(error, boto.PartialCredentialsError):
        return f"credentials without {error.kwargs.get('cred_var', 'a required value')}"
    return "none of these"


def _unreachable(endpoint: str, target: str, error: Exception) -> UnavailableError:
    cause = getattr(error, "last_exception", error)
    return UnavailableError(
        f"{endpoint} can't be reached for {target} after all retries ({cause}). "
        "Check AWS_ENDPOINT_URL and the network, or try again later."
    )
