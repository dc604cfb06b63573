"""Environment variables: the only module that reads or changes them. All other code gets their values as arguments."""

import os
import re
import ssl
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from topwork.clients.mlflow import CREDENTIAL_VARIABLES, require_mlflow
from topwork.clients.url_policy import ALLOW_HTTP_VARIABLE
from topwork.cluster.names import STORAGE_SECRET
from topwork.errors import SettingError
from topwork.nodes.addresses import split_address
from topwork.nodes.node import PEER_TIMEOUT_SECONDS, Node
from topwork.redaction import register_secrets
from topwork.spec.tracking import Tracking

if TYPE_CHECKING:
    from topwork.clients.s3.connection import StorageSettings

GRACE_VARIABLE = "TOPWORK_GRACE_SECONDS"
EXTRA_CA_VARIABLE = "TOPWORK_EXTRA_CA"
RUN_VARIABLE = "TOPWORK_RUN"
ATTEMPT_VARIABLE = "TOPWORK_ATTEMPT"
DATASET_VARIABLE = "TOPWORK_DATASET"
SELECTED_RUN_VARIABLE = "TOPWORK_SELECTED_RUN"
RESTART_VARIABLE = "TOPWORK_RESTART"
NODE_INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
NODES_VARIABLE = "TOPWORK_NODES"
COORDINATOR_VARIABLE = "TOPWORK_COORDINATOR"
PEER_TIMEOUT_VARIABLE = "TOPWORK_PEER_TIMEOUT_SECONDS"

# Any of these means that the user has configured object storage.
STORAGE_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
)
KEY_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
FILE_VARIABLES = ("AWS_CA_BUNDLE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
# Read by boto3, by Python's ssl module, by requests and by libcurl, in this order.
CA_VARIABLES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")

# With MLflow's own limits, a request to a server that does not answer takes more than ten minutes.
MLFLOW_DEFAULTS = {
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}

SECRET_VARIABLE = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|PRIVATE|API_?KEY")
# Suffixes of variables that name the location of a secret, not the secret.
LOCATION_SUFFIXES = ("_FILE", "_FILES", "_URI", "_URL", "_PATH", "_DIR", "_ENDPOINT")


def default_state_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the directory of the embedded S3 server and of the scratch directories of runs.

    Returns:
        `$TOPWORK_STATE`, or `topwork` below `$XDG_STATE_HOME` or `~/.local/state`.
    """
    if directory := environment.get("TOPWORK_STATE"):
        return Path(directory)
    state_home = environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state_home) / "topwork"


def default_kubeconfig(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the value of KUBECONFIG: one or more files, separated by colons."""
    return environment.get("KUBECONFIG")


def is_in_pod(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process runs in a pod: the kubelet sets a variable in every container."""
    return bool(environment.get("KUBERNETES_SERVICE_HOST"))


def allowed_http_hosts(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the hosts on public networks to which the user allows plain HTTP."""
    return environment.get(ALLOW_HTTP_VARIABLE, "").split(",")


def read_grace_seconds(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return the seconds from SIGTERM to SIGKILL of this pod; None if unknown.

    Raises:
        SettingError: If the value is not a number.
    """
    text = environment.get(GRACE_VARIABLE)
    try:
        return float(text) if text else None
    except ValueError:
        raise SettingError(f"{GRACE_VARIABLE} is {text!r}: expected seconds, such as 300.") from None


@dataclass(frozen=True)
class PodSettings:
    """Settings of a pod that are not part of the spec.

    Attributes:
        run: Name of the run; empty if unknown.
        attempt: UID of the Job; empty outside a cluster.
        dataset: Key prefix of the pinned dataset; empty if the source decides.
        selected_run: Name of the run whose weights are published; empty for any.
        restart: Whether the Job deletes the results of the run first.
    """

    run: str
    attempt: str
    dataset: str
    selected_run: str
    restart: bool


def read_pod_settings(environment: Mapping[str, str] = os.environ) -> PodSettings:
    """Return the settings with which the containers of a Job were rendered."""
    return PodSettings(
        run=environment.get(RUN_VARIABLE, ""),
        attempt=environment.get(ATTEMPT_VARIABLE, ""),
        dataset=environment.get(DATASET_VARIABLE, ""),
        selected_run=environment.get(SELECTED_RUN_VARIABLE, ""),
        restart=environment.get(RESTART_VARIABLE, "") == "true",
    )


def read_node(environment: Mapping[str, str] = os.environ) -> Node:
    """Return the place of this process among the nodes of the run; the only node if no others are named.

    Raises:
        SettingError: If a value is malformed.
    """
    if not (text := environment.get(NODES_VARIABLE, "")):
        return Node()
    addresses = tuple(text.split(","))
    coordinator = environment.get(COORDINATOR_VARIABLE, "")
    for variable, address in (*((NODES_VARIABLE, part) for part in addresses), (COORDINATOR_VARIABLE, coordinator)):
        try:
            split_address(address)
        except SettingError as error:
            raise SettingError(f"{variable} is {environment.get(variable, '')!r}: {error}") from None
    if repeated := [address for address in addresses if addresses.count(address) > 1]:
        raise SettingError(f"{NODES_VARIABLE} is {text!r}: it contains {repeated[0]} twice, but each node has its own.")
    index = environment.get(NODE_INDEX_VARIABLE, "")
    if not (index.isascii() and index.isdigit() and int(index) < len(addresses)):
        raise SettingError(
            f"{NODE_INDEX_VARIABLE} is {index!r}: expected the index of this node, 0 to {len(addresses) - 1}, because "
            f"{NODES_VARIABLE} names {len(addresses)} nodes."
        )
    return Node(int(index), addresses, coordinator, _read_peer_timeout(environment))


def user_environment() -> dict[str, str]:
    """Return a copy of all variables, for child processes: importing TensorFlow sets some that are not for them."""
    return dict(os.environ)


def local_node_environment(
    node: Node,
    *,
    run: str,
    dataset: str,
    storage: "StorageSettings | None",
    gpus: str | None,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Return the variables of a process that is a node on this machine.

    Args:
        node: Its place among the nodes.
        run: Name of the run.
        dataset: Key prefix of its dataset.
        storage: Address and credentials of the embedded storage; None if the variables of the user configure one.
        gpus: Its GPUs, in the format of CUDA_VISIBLE_DEVICES; None without GPUs.
        environment: Variables that it inherits.
    """
    variables = {
        RUN_VARIABLE: run,
        DATASET_VARIABLE: dataset,
        NODE_INDEX_VARIABLE: str(node.index),
        NODES_VARIABLE: ",".join(node.addresses),
        COORDINATOR_VARIABLE: node.coordinator,
        PEER_TIMEOUT_VARIABLE: f"{node.peer_timeout_seconds:g}",
    }
    if storage:
        variables |= {
            "AWS_ENDPOINT_URL": storage.endpoint_url or "",
            "AWS_ACCESS_KEY_ID": storage.access_key or "",
            "AWS_SECRET_ACCESS_KEY": storage.secret_key or "",
            "AWS_REGION": storage.region or "",
        }
    if gpus:
        variables["CUDA_VISIBLE_DEVICES"] = gpus
    return {**environment, **variables}


def _read_peer_timeout(environment: Mapping[str, str]) -> float:
    text = environment.get(PEER_TIMEOUT_VARIABLE) or str(PEER_TIMEOUT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < inf:
        raise SettingError(f"{PEER_TIMEOUT_VARIABLE} is {text!r}: expected seconds, such as {PEER_TIMEOUT_SECONDS:g}.")
    return seconds


# ── Devices and libraries ───────────────────────────────────────────────────────────────────────────────────────────


def visible_gpus(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the value of CUDA_VISIBLE_DEVICES: indices or UUIDs of the GPUs that this process may use."""
    return environment.get("CUDA_VISIBLE_DEVICES")


def hide_gpus(environment: MutableMapping[str, str] = os.environ) -> None:
    """Hide all GPUs from TensorFlow. Call this before it is imported."""
    environment["CUDA_VISIBLE_DEVICES"] = "-1"


def limit_tensorflow_log(environment: MutableMapping[str, str] = os.environ, *, verbose: bool = False) -> None:
    """Let TensorFlow's C++ code log only fatal errors, or everything if `verbose`, unless the user set a level.

    It logs errors that are none, such as an operation that oneDNN does not support on this processor, or the end of
    another node after training. What fails also raises an exception.
    """
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbose else "3")


def silence_resource_tracker(environment: MutableMapping[str, str] = os.environ) -> None:
    """Suppress the warnings of multiprocessing's resource tracker, which outlives this process and cleans up."""
    filters = (environment.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning")
    environment["PYTHONWARNINGS"] = ",".join(filter(None, filters))


# ── Secrets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def register_environment_secrets(environment: Mapping[str, str] = os.environ) -> None:
    """Redact the values of secret variables, and passwords in URLs of proxies and endpoints, in all output.

    AWS_ACCESS_KEY_ID is an identifier and not a secret; on private servers it is often an ordinary word. Key IDs of
    Amazon are redacted by their format.
    """
    secrets = [
        value
        for name, value in environment.items()
        if SECRET_VARIABLE.search(name.upper()) and not name.upper().endswith(LOCATION_SUFFIXES)
    ]
    url_passwords = [
        match[1] for value in environment.values() if (match := re.search(r"://[^/\s:@]*:([^/\s]+)@", value))
    ]
    register_secrets((value.strip() for value in (*secrets, *url_passwords)), "environment")


# ── Tracking ────────────────────────────────────────────────────────────────────────────────────────────────────────


def configure_tracking(tracking: Tracking, environment: MutableMapping[str, str] = os.environ) -> None:
    """Check that MLflow is installed, check its credentials, and limit its retries unless the user does.

    Call this before MLflow is imported.

    Args:
        tracking: `spec.tracking`; without MLflow, nothing changes.
        environment: Variables of this process.

    Raises:
        SettingError: If MLflow is not installed, or a value begins or ends with whitespace.
    """
    if tracking.mlflow is None:
        return
    require_mlflow()
    for name in CREDENTIAL_VARIABLES:
        value = environment.get(name)
        if value is not None and value != value.strip():
            raise SettingError(
                f"{name} begins or ends with a space or a line break. In a cluster, recreate the Secret that "
                "spec.tracking.mlflow.secretName names with kubectl create secret generic --from-literal."
            )
    for name, value in MLFLOW_DEFAULTS.items():
        environment.setdefault(name, value)


# ── Storage ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def has_storage_configuration(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether AWS variables or files configure object storage."""
    files = (Path.home() / ".aws" / "credentials", Path.home() / ".aws" / "config")
    return any(environment.get(name) for name in STORAGE_VARIABLES) or any(file.exists() for file in files)


def missing_storage_variables(environment: Mapping[str, str] = os.environ) -> tuple[list[str], bool]:
    """Return the AWS key variables that have no value, and whether AWS_ENDPOINT_URL is missing, too."""
    return [name for name in KEY_VARIABLES if not environment.get(name)], not environment.get("AWS_ENDPOINT_URL")


def validate_aws_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Reject malformed AWS variables, and remove empty ones: a Secret created from a template may have empty values.

    Raises:
        SettingError: If a value begins or ends with whitespace, or names a file that does not exist.
    """
    for name, value in list(environment.items()):
        if not name.startswith("AWS_"):
            continue
        if not value.strip():
            del environment[name]
        elif value != value.strip():
            raise SettingError(
                f"{name} begins or ends with a space or a line break. Recreate the Secret {STORAGE_SECRET} with "
                "kubectl create secret generic --from-literal, or encode its values with printf instead of echo."
            )
        elif name in FILE_VARIABLES and not Path(value).is_file():
            raise SettingError(
                f"{name} names {value}, which does not exist in the container. Mount the file, or remove the variable "
                f"from the Secret {STORAGE_SECRET}."
            )


def trust_extra_ca(directory: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Trust the certificate authority of `spec.compute.extraCA` in addition to the default ones, in all TLS clients.

    Args:
        directory: Directory for the bundle of all authorities.
        environment: `TOPWORK_EXTRA_CA` names the PEM file; the variables of the TLS clients are set to the bundle.

    Raises:
        SettingError: If the file is missing or contains no PEM certificates.
    """
    if not (extra_ca := environment.get(EXTRA_CA_VARIABLE)):
        return
    default_bundle = next((environment[name] for name in CA_VARIABLES[:2] if environment.get(name)), None)
    if default_bundle is None:
        import certifi

        default_bundle = certifi.where()
    bundle = directory / "authorities.pem"
    bundle.write_text(f"{_read_certificates(default_bundle)}\n{_read_certificates(extra_ca)}", "utf-8")
    environment.update(dict.fromkeys(CA_VARIABLES, str(bundle)))


def _read_certificates(path: str) -> str:
    expected = "spec.compute.extraCA names a ConfigMap and its key with a PEM file: -----BEGIN CERTIFICATE-----…"
    try:
        text = Path(path).read_text("utf-8")
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise SettingError(
            f"Cannot load certificates from {path}: it contains no valid certificate. {expected}"
        ) from error
    except OSError as error:
        raise SettingError(f"Cannot load certificates from {path}: {error.strerror}. {expected}") from error
    return text
