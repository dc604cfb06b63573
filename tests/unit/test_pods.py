"""What a container finds around it, and what it makes of it."""

import ssl
import subprocess
from pathlib import Path

import certifi
import pytest

from topwork.cli.runtime.pod_environment import CA_VARIABLES, EXTRA_CA, check_variables, trust_extra_authority
from topwork.errors import SettingError


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority as a PEM file."""
    folder = tmp_path_factory.mktemp("authority")
    request = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=extra -keyout key.pem -out ca.pem"
    subprocess.run(["openssl", *request.split()], cwd=folder, check=True, capture_output=True)
    return folder / "ca.pem"


def test_variables_without_a_value_are_dropped():
    environment = {"AWS_ENDPOINT_URL": "", "AWS_REGION": " ", "AWS_ACCESS_KEY_ID": "key", "HOME": ""}
    check_variables(environment)
    assert environment == {"AWS_ACCESS_KEY_ID": "key", "HOME": ""}


def test_a_line_break_in_a_secret_is_named():
    with pytest.raises(SettingError) as raised:
        check_variables({"AWS_SECRET_ACCESS_KEY": "secret\n"})
    assert str(raised.value) == (
        "AWS_SECRET_ACCESS_KEY begins or ends with a blank or a line break. Make the Secret topwork-s3 anew with "
        "kubectl create secret generic --from-literal, or encode its values with printf instead of echo."
    )


def test_a_variable_that_names_no_file_is_refused():
    with pytest.raises(SettingError, match=r"^AWS_WEB_IDENTITY_TOKEN_FILE names /nowhere/token, and there is no such"):
        check_variables({"AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere/token"})


def test_the_extra_authority_stands_beside_the_usual_ones(authority, tmp_path):
    environment = {EXTRA_CA: str(authority)}
    trust_extra_authority(tmp_path, environment)
    bundle = str(tmp_path / "authorities.pem")
    assert environment == {EXTRA_CA: str(authority), **dict.fromkeys(CA_VARIABLES, bundle)}
    assert trusted(bundle) == trusted(certifi.where()) + 1


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_the_extra_authority_stands_beside_those_of_a_bundle_that_is_named(name, authority, tmp_path):
    own = tmp_path / "own.pem"
    request = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=own -keyout {tmp_path}/key.pem -out {own}"
    subprocess.run(["openssl", *request.split()], check=True, capture_output=True)
    environment = {EXTRA_CA: str(authority), name: str(own)}
    trust_extra_authority(tmp_path, environment)
    assert trusted(environment["AWS_CA_BUNDLE"]) == 2


def test_without_an_extra_authority_nothing_changes(tmp_path):
    environment: dict[str, str] = {}
    trust_extra_authority(tmp_path, environment)
    assert environment == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        ("", "no certificate can be read"),
        ("words", "no certificate can be read"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no certificate can be read"),
    ],
)
def test_an_authority_that_is_none_is_named_with_its_key_of_the_spec(content, reason, tmp_path):
    path = tmp_path / "ca.crt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingError) as raised:
        trust_extra_authority(tmp_path, {EXTRA_CA: str(path)})
    assert str(raised.value) == (
        f"The authorities in {path} can't be used: {reason}. spec.compute.extraCA names a ConfigMap and in its key a "
        "PEM file: -----BEGIN CERTIFICATE-----…"
    )


def trusted(bundle: str) -> int:
    """Count the authorities of a bundle."""
    return len(ssl.create_default_context(cafile=bundle).get_ca_certs())
