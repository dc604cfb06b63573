"""What a container of a job finds around it: the variables of a Secret, an account, an authority of one's own."""

import os
import ssl
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from topwork.cli.runtime.environment import own_storage
from topwork.cluster.names import STORAGE_SECRET
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.clients.s3.storage import Meter, Storage

EXTRA_CA = "TOPWORK_EXTRA_CA"
# Read by boto3, by Python's ssl, by requests and by libcurl.
CA_VARIABLES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
FILE_VARIABLES = ("AWS_CA_BUNDLE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
KEY_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def check_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Refuse AWS variables that can't be meant, and drop the empty ones: a template of a Secret has no values.

    Args:
        environment: The variables; empty ones are taken out.

    Raises:
        SettingError: If one has a line break or a blank at an end, or names a file that is not there.
    """
    for name, value in list(environment.items()):
        if not name.startswith("AWS_"):
            continue
        if not value.strip():
            del environment[name]
        elif value != value.strip():
            raise SettingError(
                f"{name} begins or ends with a blank or a line break. Make the Secret {STORAGE_SECRET} anew with "
                "kubectl create secret generic --from-literal, or encode its values with printf instead of echo."
            )
        elif name in FILE_VARIABLES and not Path(value).is_file():
            raise SettingError(
                f"{name} names {value}, and there is no such file in the container. Mount it, or take the variable "
                f"out of the Secret {STORAGE_SECRET}."
            )


def pod_storage(uri: str, meter: "Meter") -> "Storage":
    """Open the storage of a job, with the Secret's variables or the account of the pod or node.

    Args:
        uri: `s3://bucket[/prefix]`.
        meter: Where bytes and retries are counted.

    Returns:
        The storage, checked: the bucket is there and the credentials are good.

    Raises:
        SettingError: If there are no credentials or they are refused, or the bucket is missing.
        UnavailableError: If the endpoint can't be reached.
    """
    from topwork.clients.s3.errors import NoCredentials

    try:
        return own_storage(uri, meter)
    except NoCredentials as error:
        missing = " and ".join(name for name in KEY_VARIABLES if not os.environ.get(name))
        endpoint = (
            "" if os.environ.get("AWS_ENDPOINT_URL") else " and, for a server that isn't Amazon's, AWS_ENDPOINT_URL"
        )
        raise SettingError(
            f"No credentials for {uri}: the container lacks {missing}. Put {missing}{endpoint} into the Secret "
            f"{STORAGE_SECRET} of the pod's namespace (kubectl create secret generic {STORAGE_SECRET} "
            "--from-literal=AWS_ACCESS_KEY_ID=…), or name a service account that has access to the bucket in "
            "spec.compute.serviceAccountName."
        ) from error


def trust_extra_authority(folder: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let all that speaks TLS in this process trust the authority of `spec.compute.extraCA` beside the usual ones.

    Args:
        folder: Where the bundle of all authorities is written.
        environment: Names the authority's file; set to the bundle.

    Raises:
        SettingError: If the file is not there or no PEM file of certificates.
    """
    if not (extra := environment.get(EXTRA_CA)):
        return
    usual = next((environment[name] for name in CA_VARIABLES[:2] if environment.get(name)), None)
    if usual is None:
        import certifi

        usual = certifi.where()
    bundle = folder / "authorities.pem"
    bundle.write_text(f"{_certificates(usual)}\n{_certificates(extra)}", "utf-8")
    environment.update(dict.fromkeys(CA_VARIABLES, str(bundle)))


def _certificates(path: str) -> str:
    expected = "spec.compute.extraCA names a ConfigMap and in its key a PEM file: -----BEGIN CERTIFICATE-----…"
    try:
        text = Path(path).read_text("utf-8")
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise SettingError(
            f"The authorities in {path} can't be used: no certificate can be read. {expected}"
        ) from error
    except OSError as error:
        raise SettingError(f"The authorities in {path} can't be used: {error.strerror}. {expected}") from error
    return text
