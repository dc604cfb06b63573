"""What the tests of this folder stand on, as far as it needs no cluster; these run with all others."""

import subprocess

import kubernetes_validate
import pytest
from tests.cluster.kubectl import Kubectl
from tests.cluster.manifests import BASE, base_objects, probe, spec_of, storage_secret
from tests.cluster.storage import served_storage
from tests.cluster.surroundings import as_account, has_cluster, host, image, in_cluster_config, program, size

from topwork import __version__
from topwork.clients.s3.storage import Storage, StorageSettings
from topwork.errors import SettingError
from topwork.spec import TransferJob

KUBERNETES = "1.36"


def test_storage_is_served_at_another_address_to_who_has_its_keys(tmp_path):
    # Stands for an address of the network: the server itself listens on 127.0.0.1 alone.
    with served_storage(tmp_path, "127.0.0.2") as storage:
        stored = storage.at("here/photos")
        stored.write("red/1.png", b"x" * 3_000_000)
        assert stored.read("red/1.png") == b"x" * 3_000_000
        assert storage.address == ("127.0.0.2", int(storage.variables["AWS_ENDPOINT_URL"].rpartition(":")[2]))
        assert {name for name, value in storage.variables.items() if value} == {
            "AWS_ENDPOINT_URL",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_REGION",
        }
        stranger = StorageSettings(storage.settings.endpoint_url, "nobody", "knows", "us-east-1", attempts=1)
        with pytest.raises(SettingError):
            Storage(stored.uri, stranger).read("red/1.png")


def test_the_address_of_this_machine_is_stated_or_no_loopback():
    assert host("https://127.0.0.1:6443", {"TOPWORK_TEST_HOST": "10.0.0.7"}) == "10.0.0.7"
    try:
        found = host("https://127.0.0.1:6443", {})
    except OSError as error:
        assert str(error) == "This machine has no address that pods could reach. Set TOPWORK_TEST_HOST to one."
    else:
        assert not found.startswith("127.")


def test_no_cluster_is_used_unasked():
    assert not has_cluster({})
    assert not has_cluster({"HOME": "/root", "KUBERNETES_SERVICE_HOST": "10.96.0.1"})
    assert has_cluster({"KUBECONFIG": "/etc/kubeconfig"})


def test_image_and_size_are_as_told():
    assert image({}) == f"topwork:{__version__}-cpu"
    assert image({"TOPWORK_IMAGE": "registry/topwork:1"}) == "registry/topwork:1"
    assert (size({})["cpu"], size({})["memory"]) == ("1", "3Gi")
    assert size({"TOPWORK_TEST_CPU": "2"})["cpu"] == "2"


def test_the_job_is_a_valid_spec():
    job = TransferJob.model_validate(spec_of("tiny", "s3://bucket/topwork", "s3://bucket/photos"))
    assert job.spec.compute.gpus == 0


@pytest.mark.parametrize("manifest", [probe("192.0.2.7", 8333), storage_secret({"AWS_REGION": "here"})])
def test_what_the_tests_apply_is_valid(manifest):
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.skipif(not BASE.is_dir(), reason="make generate writes k8s/base")
def test_the_objects_of_the_base_move_to_another_namespace():
    objects = base_objects("elsewhere")
    for each in objects:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    namespaces = [each for each in objects if each["kind"] == "Namespace"]
    assert [each["metadata"]["name"] for each in namespaces] == ["elsewhere"]
    assert namespaces[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {each["metadata"]["namespace"] for each in objects if each["kind"] != "Namespace"} == {"elsewhere"}
    assert "topwork-submitter" in {each["metadata"]["name"] for each in objects if each["kind"] == "Role"}


def test_the_kubeconfig_of_an_account_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.cluster.surroundings.ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    (tmp_path / "ca.crt").write_text("certificates")
    path = tmp_path / "account.json"
    path.write_text(as_account(in_cluster_config(), "the-token"))
    monkeypatch.setenv("KUBECONFIG", str(path))
    shown = Kubectl().config()
    assert shown["users"] == [{"name": "account", "user": {"token": "the-token"}}]
    assert shown["clusters"][0]["cluster"]["server"] == "https://[fd00::1]:443"
    assert shown["current-context"] == "account"


def test_the_programs_are_there():
    for name in ("kubectl", "topwork"):
        subprocess.run([program(name), "--help"], check=True, capture_output=True, timeout=60)
