"""kubeconfig files, credentials, exec plugins and proxies, compared with kubectl where possible."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import TOKEN, ApiServer
from kubernetes.config import ConfigException

from topwork.clients.kubernetes.cluster import Cluster, ClusterSettings, connect
from topwork.errors import SettingError

KUBECTL = Path(sys.executable).with_name("kubectl")


def write_kubeconfig(path: Path, **content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **content}))
    return path


def entry(kind: str, name: str, **content: Any) -> dict[str, Any]:
    return {"name": name, kind: content}


def one_context(server: str, namespace: str = "team-a", **user: Any) -> dict[str, Any]:
    """Return a kubeconfig with one context `a`."""
    return {
        "current-context": "a",
        "clusters": [entry("cluster", "a", server=server)],
        "contexts": [entry("context", "a", cluster="a", user="a", namespace=namespace)],
        "users": [entry("user", "a", **(user or {"token": TOKEN}))],
    }


def open_cluster(**settings: Any) -> Cluster:
    return connect(
        ClusterSettings(attempts=1, timeout_seconds=5, default_kubeconfig=os.environ.get("KUBECONFIG"), **settings)
    )


def list_error(**settings: Any) -> str:
    with pytest.raises(SettingError) as caught:
        open_cluster(**settings).list("Pod")
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ── Files and contexts ────────────────────────────────────────────────────────────────────────────────────────────────


def kubectl_view(*arguments: str) -> dict[str, Any]:
    command = [str(KUBECTL), "config", "view", "--minify", "--raw", "-o", "json", *arguments]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


@pytest.mark.parametrize("context", [None, "a", "b", "shared"])
def test_several_files_are_merged_like_kubectl(context: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shared = entry("context", "shared", cluster="b", user="b", namespace="first")
    first = {"clusters": [entry("cluster", "a", server="http://a:1")], "contexts": [shared], "users": []}
    first["contexts"] += [entry("context", "a", cluster="a", user="b", namespace="one")]
    second: dict[str, Any] = {"clusters": [entry("cluster", "a", server="http://other:9")]}
    second["clusters"] += [entry("cluster", "b", server="http://b:2")]
    second["contexts"] = [entry("context", "shared", cluster="a", user="b", namespace="second")]
    second["contexts"] += [entry("context", "b", cluster="b", user="b")]
    files = [
        write_kubeconfig(tmp_path / "no-current", **first),
        write_kubeconfig(tmp_path / "second", **second, **{"current-context": "b"}),
        write_kubeconfig(tmp_path / "three", users=[entry("user", "b", token="t")], **{"current-context": "a"}),
    ]
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(["", str(tmp_path / "missing"), *map(str, files)]))
    expected = kubectl_view(*(["--context", context] if context else []))
    cluster = open_cluster(context=context)
    assert cluster.server == expected["clusters"][0]["cluster"]["server"]
    assert cluster.namespace == expected["contexts"][0]["context"].get("namespace", "default")


def test_file_in_the_home_directory_is_the_default(api_server: ApiServer, tmp_path: Path):
    api_server.kubeconfig(Path(os.environ["HOME"]) / ".kube" / "config")
    assert open_cluster().list("Job") == []
    assert open_cluster().namespace == "team-a"


def test_kubectl_reads_the_same_object_with_the_same_file(tmp_path: Path):
    with ApiServer(token=None) as server:  # kubectl sends no token without TLS
        server.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "run"}, "data": {"a": "b"}})
        file = server.kubeconfig(tmp_path / "config")
        url_path = "/api/v1/namespaces/team-a/configmaps/run"
        command = [str(KUBECTL), "--kubeconfig", str(file), "get", "--raw", url_path]
        expected = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert open_cluster(kubeconfig=str(file)).get("ConfigMap", "run") == expected


def test_token_is_not_sent_to_another_machine_without_tls(
    api_server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("http_proxy", api_server.url)
    file = write_kubeconfig(tmp_path / "config", **one_context("http://cluster.invalid"))
    assert "rejected the credentials" in list_error(kubeconfig=str(file))
    assert "authorization" not in api_server.requests[-1].headers


def test_namespace_setting_overrides_the_context(kubeconfig: Path):
    assert open_cluster(kubeconfig=str(kubeconfig), namespace="default").namespace == "default"


def test_context_without_a_namespace_uses_default(api_server: ApiServer, tmp_path: Path):
    file = api_server.kubeconfig(tmp_path / "config", namespace=None)
    assert open_cluster(kubeconfig=str(file)).namespace == "default"


def test_missing_configuration_names_the_searched_file():
    assert list_error() == (
        "No kubeconfig found: ~/.kube/config does not exist, and this process does not run in a pod. "
        "Set --kubeconfig or KUBECONFIG, and test the file with: kubectl cluster-info"
    )


def test_explicit_kubeconfig_must_exist(tmp_path: Path):
    missing = tmp_path / "missing"
    assert list_error(kubeconfig=str(missing)) == f"{missing} does not exist. Set --kubeconfig to a kubeconfig file."


def test_invalid_yaml_names_the_line(tmp_path: Path):
    file = tmp_path / "config"
    file.write_text(f"apiVersion: v1\nusers: [{{token: {TOKEN}}}\n")
    assert list_error(kubeconfig=str(file)).startswith(f"{file} is not a kubeconfig: line 3: ")


def test_file_that_is_not_a_mapping_is_rejected(tmp_path: Path):
    file = tmp_path / "config"
    file.write_text("- a\n- b\n")
    assert list_error(kubeconfig=str(file)) == (
        f"{file} is not a kubeconfig: expected a mapping with clusters, contexts and users."
    )


def test_entry_without_a_name_is_rejected(tmp_path: Path):
    file = write_kubeconfig(tmp_path / "config", users=[{"user": {"token": TOKEN}}])
    assert list_error(kubeconfig=str(file)) == f"{file} is not a kubeconfig: an entry of users has no name."


def test_missing_current_context_lists_the_contexts(tmp_path: Path):
    content = one_context("http://a:1") | {"current-context": ""}
    file = write_kubeconfig(tmp_path / "config", **content)
    assert list_error(kubeconfig=str(file)) == (
        f"{file} sets no current context. Choose one with --context or kubectl config use-context: a."
    )


def test_unknown_context_lists_the_contexts(tmp_path: Path):
    file = write_kubeconfig(tmp_path / "config", **one_context("http://a:1"))
    assert list_error(kubeconfig=str(file), context="b") == (
        f"{file} does not contain context b: 'b' is not in contexts (a)."
    )


def test_context_with_a_missing_cluster_is_rejected(tmp_path: Path):
    file = write_kubeconfig(tmp_path / "config", **(one_context("http://a:1") | {"clusters": []}))
    assert list_error(kubeconfig=str(file)) == (
        f"{file} does not contain the cluster of context a: 'a' is not in clusters (which is empty)."
    )


def test_context_with_a_missing_user_is_rejected(tmp_path: Path):
    file = write_kubeconfig(tmp_path / "config", **(one_context("http://a:1") | {"users": []}))
    assert list_error(kubeconfig=str(file)) == (
        f"{file} does not contain the user of context a: 'a' is not in users (which is empty)."
    )


def test_cluster_without_a_server_is_rejected(tmp_path: Path):
    content = one_context("http://a:1") | {"clusters": [entry("cluster", "a", **{"insecure-skip-tls-verify": True})]}
    file = write_kubeconfig(tmp_path / "config", **content)
    assert list_error(kubeconfig=str(file)) == f"{file}: cluster a has no server. Expected its URL."


def test_certificate_that_is_not_base64_is_rejected(tmp_path: Path):
    user = {"client-certificate-data": "abc", "client-key-data": "abc"}
    file = write_kubeconfig(tmp_path / "config", **one_context("https://a:1", **user))
    assert list_error(kubeconfig=str(file)).startswith(f"{file} can't be used: context a: ")


def test_missing_certificate_is_named(tmp_path: Path):
    user = {"client-certificate": "client.pem", "client-key": "client.key"}
    file = write_kubeconfig(tmp_path / "config", **one_context("https://a:1", **user))
    assert list_error(kubeconfig=str(file)) == (
        f"{file} can't be used: context a: File does not exist: {tmp_path / 'client.pem'}."
    )


# ── Credentials ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_token_file_is_relative_to_its_kubeconfig_and_may_end_with_a_newline(api_server: ApiServer, tmp_path: Path):
    content = one_context(api_server.url, tokenFile="secret/token")
    users = write_kubeconfig(tmp_path / "users" / "config", users=content.pop("users"))
    (tmp_path / "users" / "secret").mkdir()
    (tmp_path / "users" / "secret" / "token").write_text(TOKEN + "\n")
    without_users = write_kubeconfig(tmp_path / "rest" / "config", **content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", f"{without_users}{os.pathsep}{users}")
        assert open_cluster().list("Job") == []


def test_missing_token_file_is_named(api_server: ApiServer, tmp_path: Path):
    file = write_kubeconfig(tmp_path / "config", **one_context(api_server.url, tokenFile="token"))
    assert list_error(kubeconfig=str(file)) == (
        f"{file}: tokenFile can't be read: [Errno 2] No such file or directory: '{tmp_path / 'token'}'"
    )


def test_token_with_a_newline_is_rejected_without_printing_it(api_server: ApiServer, tmp_path: Path):
    file = write_kubeconfig(tmp_path / "config", **one_context(api_server.url, token=f"{TOKEN}\nmore"))
    assert list_error(kubeconfig=str(file)) == (
        "The token of context a contains a newline or another character that is not allowed in an HTTP header. "
        "Log in again as you do for kubectl."
    )


def test_username_and_password_are_sent(api_server: ApiServer, tmp_path: Path):
    file = write_kubeconfig(tmp_path / "config", **one_context(api_server.url, username="alice", password="secret"))
    assert "rejected the credentials" in list_error(kubeconfig=str(file))
    assert api_server.requests[-1].headers["authorization"] == "Basic YWxpY2U6c2VjcmV0"


def test_impersonated_user_is_sent(api_server: ApiServer, tmp_path: Path):
    content = one_context(api_server.url, token=TOKEN, **{"as": "robot"})
    open_cluster(kubeconfig=str(write_kubeconfig(tmp_path / "config", **content))).list("Job")
    assert api_server.requests[-1].headers["Impersonate-User"] == "robot"


def test_impersonated_groups_are_rejected(api_server: ApiServer, tmp_path: Path):
    content = one_context(api_server.url, token=TOKEN, **{"as": "robot", "as-groups": ["admins"]})
    file = write_kubeconfig(tmp_path / "config", **content)
    assert (
        list_error(kubeconfig=str(file)) == f"{file}: user a impersonates groups (as-groups). Only `as` is supported."
    )


PLUGIN = """#!/bin/sh
echo run >> "$LOG"
{failure}
printf '{{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{{"token":"%s"%s}}}}' \
  "$(cat "$TOKEN_FILE")" "$(cat "$EXPIRY_FILE" 2>/dev/null)"
"""


@pytest.fixture
def plugin(api_server: ApiServer, tmp_path: Path) -> Callable[..., Path]:
    """Function that writes a kubeconfig with an exec plugin, which reads the files `token` and `expiry` next to it."""

    def write(failure: str = "", **more: Any) -> Path:
        directory = tmp_path / "cloud"
        directory.mkdir()
        script = directory / "bin" / "login"
        script.parent.mkdir()
        script.write_text(PLUGIN.format(failure=failure))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        (directory / "token").write_text(TOKEN)
        files = {"LOG": "log", "TOKEN_FILE": "token", "EXPIRY_FILE": "expiry"}
        env = [{"name": name, "value": str(directory / file)} for name, file in files.items()]
        command = {"apiVersion": "client.authentication.k8s.io/v1", "command": "./bin/login", "env": env, **more}
        command["interactiveMode"] = "Never"
        return write_kubeconfig(directory / "config", **one_context(api_server.url, exec=command))

    return write


def plugin_calls(file: Path) -> int:
    return (file.parent / "log").read_text().count("run")


def test_plugin_next_to_the_file_runs_once(plugin: Callable[..., Path]):
    file = plugin()
    cluster = open_cluster(kubeconfig=str(file))
    assert cluster.list("Job") == []
    assert cluster.list("Pod") == []
    assert plugin_calls(file) == 1


def test_credential_that_expires_soon_is_renewed_by_its_plugin(api_server: ApiServer, plugin: Callable[..., Path]):
    file = plugin()
    soon = (datetime.now(UTC) + timedelta(seconds=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    (file.parent / "expiry").write_text(f',"expirationTimestamp":"{soon}"')
    (file.parent / "token").write_text("first")
    cluster = open_cluster(kubeconfig=str(file))
    (file.parent / "token").write_text(TOKEN)
    assert cluster.list("Job") == []
    assert [request.code for request in api_server.requests] == [200]


def test_rejected_credential_is_renewed_once(api_server: ApiServer, plugin: Callable[..., Path]):
    file = plugin()
    (file.parent / "token").write_text("old")
    cluster = open_cluster(kubeconfig=str(file))
    (file.parent / "token").write_text(TOKEN)
    assert cluster.list("Job") == []
    assert [request.code for request in api_server.requests] == [401, 200]
    assert plugin_calls(file) == 2


def test_credential_that_is_rejected_after_renewal_raises_an_error(api_server: ApiServer, plugin: Callable[..., Path]):
    file = plugin()
    (file.parent / "token").write_text("wrong")
    assert list_error(kubeconfig=str(file)) == (
        f"{api_server.url} rejected the credentials of context a (401: Unauthorized). "
        "Log in again as you do for kubectl, or choose another context with --context."
    )
    assert [request.code for request in api_server.requests] == [401]


def test_failed_plugin_reports_its_stderr(plugin: Callable[..., Path], capfd: pytest.CaptureFixture[str]):
    file = plugin(failure="echo 'SSO session has expired' >&2; exit 3")
    assert list_error(kubeconfig=str(file)) == (
        f"{file}: login of context a failed: exec: process returned 3. SSO session has expired. "
        "Log in again as you do for kubectl."
    )
    assert capfd.readouterr() == ("", "")


def test_missing_plugin_reports_its_install_hint(plugin: Callable[..., Path]):
    file = plugin(command="missing-cloud-login", installHint="Install it\nfrom the cloud.")
    assert list_error(kubeconfig=str(file)) == (
        f"{file}: login of context a failed: [Errno 2] No such file or directory: 'missing-cloud-login'. "
        "Install it from the cloud."
    )


def test_plugin_that_returns_no_credential_raises_setting_error(plugin: Callable[..., Path]):
    credential = '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{}}'
    file = plugin(failure=f"echo '{credential}'; exit")
    assert list_error(kubeconfig=str(file)) == (
        f"{file}: login of context a failed: exec: the plugin returned neither token nor clientCertificateData. "
        "Log in again as you do for kubectl."
    )


def test_plugin_that_fails_on_renewal_reports_its_stderr(
    plugin: Callable[..., Path], capfd: pytest.CaptureFixture[str]
):
    file = plugin()
    soon = (datetime.now(UTC) + timedelta(seconds=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    (file.parent / "expiry").write_text(f',"expirationTimestamp":"{soon}"')
    cluster = open_cluster(kubeconfig=str(file))
    (file.parent / "bin" / "login").write_text("#!/bin/sh\necho logged out >&2\nexit 1\n")
    with pytest.raises(SettingError) as caught:
        cluster.list("Job")
    assert str(caught.value) == (
        f"{file}: login of context a failed: exec: process returned 1. logged out. Log in again as you do for kubectl."
    )
    assert capfd.readouterr() == ("", "")


def test_failed_token_renewal_raises_setting_error(
    api_server: ApiServer, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
):
    """The client reads the token of a pod again every minute; its file may be empty."""
    cluster = open_cluster(kubeconfig=str(kubeconfig))

    def renew(_: object) -> None:
        raise ConfigException("Token file exists but empty.")

    cluster._client.connection.client.configuration.refresh_api_key_hook = renew
    with pytest.raises(SettingError) as caught:
        cluster.list("Job")
    assert str(caught.value) == (
        "Login of context tests failed: Token file exists but empty. Log in again as you do for kubectl."
    )


# ── Proxies ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_loopback_address_bypasses_the_environment_proxy(cluster_file: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert open_cluster(kubeconfig=str(cluster_file)).list("Job") == []


def test_other_address_uses_the_environment_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with ApiServer(token=None) as server:
        monkeypatch.setenv("http_proxy", server.url)
        monkeypatch.setenv("no_proxy", "localhost")
        file = write_kubeconfig(tmp_path / "config", **one_context("http://cluster.invalid"))
        assert open_cluster(kubeconfig=str(file)).list("Job") == []
        assert server.requests[-1].headers["Host"] == "cluster.invalid"


def test_proxy_url_of_the_kubeconfig_applies_to_every_address(
    api_server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("no_proxy", "*")
    content = one_context("http://127.0.0.1:9")
    content["clusters"][0]["cluster"]["proxy-url"] = api_server.url
    assert open_cluster(kubeconfig=str(write_kubeconfig(tmp_path / "config", **content))).list("Job") == []
    assert api_server.requests[-1].headers["Host"] == "127.0.0.1:9"


@pytest.fixture
def cluster_file(api_server: ApiServer, tmp_path: Path) -> Path:
    return api_server.kubeconfig(tmp_path / "config")
