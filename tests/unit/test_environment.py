"""Environment variables: state directory, storage, AWS variables of a pod and certificate authorities."""

import ssl
import subprocess
from pathlib import Path

import certifi
import pytest

from topwork.cli.runtime.environment import (
    CA_VARIABLES,
    EXTRA_CA_VARIABLE,
    allowed_http_hosts,
    default_kubeconfig,
    default_state_directory,
    has_storage_configuration,
    hide_gpus,
    is_in_pod,
    limit_tensorflow_log,
    local_node_environment,
    missing_storage_variables,
    read_grace_seconds,
    read_node,
    read_pod_settings,
    silence_resource_tracker,
    trust_extra_ca,
    validate_aws_variables,
    visible_gpus,
)
from topwork.clients.s3.storage import StorageSettings
from topwork.errors import SettingError
from topwork.nodes.node import PEER_TIMEOUT_SECONDS, Node


def test_state_directory_follows_its_variable_then_xdg_then_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert default_state_directory({"TOPWORK_STATE": "/a", "XDG_STATE_HOME": "/b"}) == Path("/a")
    assert default_state_directory({"XDG_STATE_HOME": "/b"}) == Path("/b/topwork")
    assert default_state_directory({}) == Path("/home/ada/.local/state/topwork")


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE"])
def test_aws_variable_configures_storage(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert has_storage_configuration({name: "x"})
    assert not has_storage_configuration({name: ""})


def test_aws_file_configures_storage(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_storage_configuration({})
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").touch()
    assert has_storage_configuration({})


def test_missing_storage_variables_are_listed():
    assert missing_storage_variables({}) == (["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"], True)
    assert missing_storage_variables({"AWS_ACCESS_KEY_ID": "a", "AWS_ENDPOINT_URL": "b"}) == (
        ["AWS_SECRET_ACCESS_KEY"],
        False,
    )


def test_cluster_variables_are_read():
    assert (default_kubeconfig({"KUBECONFIG": "/a:/b"}), default_kubeconfig({})) == ("/a:/b", None)
    assert (is_in_pod({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}), is_in_pod({})) == (True, False)


def test_allowed_http_hosts_are_separated_by_commas():
    assert allowed_http_hosts({"TOPWORK_ALLOW_HTTP": "a.example,b.example"}) == ["a.example", "b.example"]


def test_grace_period_is_a_number_of_seconds_or_unknown():
    assert (read_grace_seconds({"TOPWORK_GRACE_SECONDS": "300"}), read_grace_seconds({})) == (300.0, None)
    with pytest.raises(SettingError, match=r"^TOPWORK_GRACE_SECONDS is '5m': expected seconds, such as 300\.$"):
        read_grace_seconds({"TOPWORK_GRACE_SECONDS": "5m"})


def test_gpus_are_hidden():
    environment = {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert (visible_gpus(environment), visible_gpus({})) == ("0,1", None)
    hide_gpus(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "-1"}


def test_tensorflow_log_level_of_the_user_is_kept():
    quiet: dict[str, str] = {}
    limit_tensorflow_log(quiet)
    verbose: dict[str, str] = {}
    limit_tensorflow_log(verbose, verbose=True)
    chosen = {"TF_CPP_MIN_LOG_LEVEL": "1"}
    limit_tensorflow_log(chosen)
    assert [environment["TF_CPP_MIN_LOG_LEVEL"] for environment in (quiet, verbose, chosen)] == ["3", "0", "1"]


def test_warning_filters_of_the_user_are_kept():
    environment = {"PYTHONWARNINGS": "error"}
    silence_resource_tracker(environment)
    assert environment == {"PYTHONWARNINGS": "error,ignore:resource_tracker:UserWarning"}


# ── AWS variables of a pod ──────────────────────────────────────────────────────────────────────────────────────────


def test_empty_aws_variables_are_removed():
    environment = {"AWS_ENDPOINT_URL": "", "AWS_REGION": " ", "AWS_ACCESS_KEY_ID": "key", "HOME": ""}
    validate_aws_variables(environment)
    assert environment == {"AWS_ACCESS_KEY_ID": "key", "HOME": ""}


def test_aws_variable_with_a_line_break_is_rejected():
    with pytest.raises(SettingError) as raised:
        validate_aws_variables({"AWS_SECRET_ACCESS_KEY": "secret\n"})
    assert str(raised.value) == (
        "AWS_SECRET_ACCESS_KEY begins or ends with a space or a line break. Recreate the Secret topwork-s3 with "
        "kubectl create secret generic --from-literal, or encode its values with printf instead of echo."
    )


def test_aws_variable_that_names_a_missing_file_is_rejected():
    with pytest.raises(
        SettingError, match=r"^AWS_WEB_IDENTITY_TOKEN_FILE names /nowhere/token, which does not exist in the container"
    ):
        validate_aws_variables({"AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere/token"})


# ── Certificate authorities ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def extra_ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority as a PEM file."""
    directory = tmp_path_factory.mktemp("authority")
    request = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=extra -keyout key.pem -out ca.pem"
    subprocess.run(["openssl", *request.split()], cwd=directory, check=True, capture_output=True)
    return directory / "ca.pem"


def count_authorities(bundle: str) -> int:
    return len(ssl.create_default_context(cafile=bundle).get_ca_certs())


def test_extra_ca_is_trusted_in_addition_to_the_default_bundle(extra_ca, tmp_path):
    environment = {EXTRA_CA_VARIABLE: str(extra_ca)}
    trust_extra_ca(tmp_path, environment)
    bundle = str(tmp_path / "authorities.pem")
    assert environment == {EXTRA_CA_VARIABLE: str(extra_ca), **dict.fromkeys(CA_VARIABLES, bundle)}
    assert count_authorities(bundle) == count_authorities(certifi.where()) + 1


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_extra_ca_is_trusted_in_addition_to_a_configured_bundle(name, extra_ca, tmp_path):
    configured_bundle = tmp_path / "own.pem"
    request = (
        f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=own -keyout {tmp_path}/key.pem -out {configured_bundle}"
    )
    subprocess.run(["openssl", *request.split()], check=True, capture_output=True)
    environment = {EXTRA_CA_VARIABLE: str(extra_ca), name: str(configured_bundle)}
    trust_extra_ca(tmp_path, environment)
    assert count_authorities(environment["AWS_CA_BUNDLE"]) == 2


def test_nothing_changes_without_an_extra_ca(tmp_path):
    environment: dict[str, str] = {}
    trust_extra_ca(tmp_path, environment)
    assert environment == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        ("", "it contains no valid certificate"),
        ("words", "it contains no valid certificate"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "it contains no valid certificate"),
    ],
)
def test_invalid_extra_ca_error_names_its_spec_key(content, reason, tmp_path):
    path = tmp_path / "ca.crt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingError) as raised:
        trust_extra_ca(tmp_path, {EXTRA_CA_VARIABLE: str(path)})
    assert str(raised.value) == (
        f"Cannot load certificates from {path}: {reason}. spec.compute.extraCA names a ConfigMap and its key with a "
        "PEM file: -----BEGIN CERTIFICATE-----…"
    )


# ── Nodes ───────────────────────────────────────────────────────────────────────────────────────────────────────────

NODES = {
    "JOB_COMPLETION_INDEX": "1",
    "TOPWORK_NODES": "cats-0.cats:9112,[fd00::1]:9112",
    "TOPWORK_COORDINATOR": "cats-0.cats:9122",
}


def test_a_process_without_variables_is_the_only_node():
    assert read_node({}) == Node()
    assert read_node({"JOB_COMPLETION_INDEX": "3", "TOPWORK_NODES": ""}) == Node()


def test_the_place_among_the_nodes_is_read():
    node = read_node({**NODES, "TOPWORK_PEER_TIMEOUT_SECONDS": "90"})
    assert node == Node(1, ("cats-0.cats:9112", "[fd00::1]:9112"), "cats-0.cats:9122", 90.0)
    assert read_node(NODES).peer_timeout_seconds == PEER_TIMEOUT_SECONDS


@pytest.mark.parametrize("index", ["", "2", "-1", "one", "1.0", "²"])
def test_a_malformed_index_of_a_node_is_reported(index):
    with pytest.raises(SettingError) as raised:
        read_node({**NODES, "JOB_COMPLETION_INDEX": index})
    assert str(raised.value) == (
        f"JOB_COMPLETION_INDEX is {index!r}: expected the index of this node, 0 to 1, because TOPWORK_NODES "
        "names 2 nodes."
    )


@pytest.mark.parametrize(
    ("variable", "value", "address"),
    [
        ("TOPWORK_NODES", "cats-0.cats:9112,", ""),
        ("TOPWORK_NODES", "cats-0.cats,cats-1.cats:1", "cats-0.cats"),
        ("TOPWORK_COORDINATOR", "", ""),
        ("TOPWORK_COORDINATOR", "cats-0.cats:0", "cats-0.cats:0"),
    ],
)
def test_a_malformed_address_of_a_node_is_reported(variable, value, address):
    with pytest.raises(SettingError) as raised:
        read_node({**NODES, variable: value})
    assert str(raised.value) == (
        f"{variable} is {value!r}: {address!r} is not an address of a node: expected host:port, such as "
        "cats-0.cats:9112 or [fd00::1]:9112."
    )


def test_an_address_of_two_nodes_is_reported():
    with pytest.raises(SettingError) as raised:
        read_node({**NODES, "TOPWORK_NODES": "a:1,b:1,a:1"})
    assert str(raised.value) == "TOPWORK_NODES is 'a:1,b:1,a:1': it contains a:1 twice, but each node has its own."


@pytest.mark.parametrize("seconds", ["soon", "0", "-1", "inf", "nan"])
def test_a_malformed_peer_timeout_is_reported(seconds):
    with pytest.raises(
        SettingError, match=f"TOPWORK_PEER_TIMEOUT_SECONDS is '{seconds}': expected seconds, such as 1200"
    ):
        read_node({**NODES, "TOPWORK_PEER_TIMEOUT_SECONDS": seconds})


def test_a_local_node_reads_what_its_environment_says():
    node = Node(1, ("127.0.0.1:1", "127.0.0.1:2"), "127.0.0.1:3", 300.0)
    storage = StorageSettings(endpoint_url="http://127.0.0.1:4", access_key="a", secret_key="b", region="us-east-1")
    environment = local_node_environment(
        node, run="cats-1", dataset="datasets/cats/1", storage=storage, gpus="2,3", environment={"HOME": "/home/ada"}
    )
    assert read_node(environment) == node
    pod = read_pod_settings(environment)
    assert (pod.run, pod.dataset, pod.attempt, pod.restart) == ("cats-1", "datasets/cats/1", "", False)
    assert {name: value for name, value in environment.items() if not name.startswith(("TOPWORK_", "JOB_"))} == {
        "HOME": "/home/ada",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:4",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
        "CUDA_VISIBLE_DEVICES": "2,3",
    }


def test_a_local_node_inherits_the_storage_and_devices_of_the_user():
    environment = {"AWS_PROFILE": "ada", "CUDA_VISIBLE_DEVICES": "-1"}
    local = local_node_environment(
        Node(0, ("a:1", "b:1"), "a:2"), run="r", dataset="d", storage=None, gpus=None, environment=environment
    )
    assert environment.items() <= local.items()
    assert "AWS_ENDPOINT_URL" not in local
