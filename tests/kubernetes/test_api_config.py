"""kubeconfig files, plugins, service accounts and proxies: what kubectl would take, from real files."""

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


def config(path: Path, **content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **content}))
    return path


def entry(kind: str, name: str, **content: Any) -> dict[str, Any]:
    return {"name": name, kind: content}


def whole(server: str, namespace: str = "team-a", **user: Any) -> dict[str, Any]:
    """Content of a kubeconfig with one context `a`."""
    return {
        "current-context": "a",
        "clusters": [entry("cluster", "a", server=server)],
        "contexts": [entry("context", "a", cluster="a", user="a", namespace=namespace)],
        "users": [entry("user", "a", **(user or {"token": TOKEN}))],
    }


def opened(**settings: Any) -> Cluster:
    return connect(ClusterSettings(attempts=1, timeout_seconds=5, **settings))


def refusal(**settings: Any) -> str:
    with pytest.raises(SettingError) as caught:
        opened(**settings).list("Pod")
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ── Files and contexts ──────────────────────────────────────────────────────────────────────────────────────────────


def kubectl_view(*arguments: str) -> dict[str, Any]:
    command = [str(KUBECTL), "config", "view", "--minify", "--raw", "-o", "json", *arguments]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


@pytest.mark.parametrize("context", [None, "a", "b", "shared"])
def test_several_files_merge_as_kubectl_merges_them(
    context: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shared = entry("context", "shared", cluster="b", user="b", namespace="first")
    one = {"clusters": [entry("cluster", "a", server="http://a:1")], "contexts": [shared], "users": []}
    one["contexts"] += [entry("context", "a", cluster="a", user="b", namespace="one")]
    two: dict[str, Any] = {"clusters": [entry("cluster", "a", server="http://other:9")]}
    two["clusters"] += [entry("cluster", "b", server="http://b:2")]
    two["contexts"] = [entry("context", "shared", cluster="a", user="b", namespace="second")]
    two["contexts"] += [entry("context", "b", cluster="b", user="b")]
    files = [
        config(tmp_path / "no-current", **one),
        config(tmp_path / "two", **two, **{"current-context": "b"}),
        config(tmp_path / "three", users=[entry("user", "b", token="t")], **{"current-context": "a"}),
    ]
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(["", str(tmp_path / "missing"), *map(str, files)]))
    expected = kubectl_view(*(["--context", context] if context else []))
    cluster = opened(context=context)
    assert cluster.server == expected["clusters"][0]["cluster"]["server"]
    assert cluster.namespace == expected["contexts"][0]["context"].get("namespace", "default")


def test_the_file_in_the_home_folder_is_the_default(api_server: ApiServer, tmp_path: Path):
    api_server.kubeconfig(Path(os.environ["HOME"]) / ".kube" / "config")
    assert opened().list("Job") == []
    assert opened().namespace == "team-a"


def test_kubectl_reads_the_same_object_with_the_same_file(tmp_path: Path):
    """The server of these tests answers kubectl as well."""
    with ApiServer(token=None) as server:  # kubectl sends no token without TLS
        server.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "run"}, "data": {"a": "b"}})
        file = server.kubeconfig(tmp_path / "config")
        address = "/api/v1/namespaces/team-a/configmaps/run"
        command = [str(KUBECTL), "--kubeconfig", str(file), "get", "--raw", address]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert opened(kubeconfig=str(file)).get("ConfigMap", "run") == told


def test_no_token_goes_to_another_machine_without_tls(
    api_server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("http_proxy", api_server.url)
    file = config(tmp_path / "config", **whole("http://cluster.invalid"))
    assert "does not accept" in refusal(kubeconfig=str(file))
    assert "authorization" not in api_server.requests[-1].headers


def test_a_namespace_that_is_stated_comes_before_the_one_of_the_context(kubeconfig: Path):
    assert opened(kubeconfig=str(kubeconfig), namespace="default").namespace == "default"


def test_a_context_without_a_namespace_means_default(api_server: ApiServer, tmp_path: Path):
    file = api_server.kubeconfig(tmp_path / "config", namespace=None)
    assert opened(kubeconfig=str(file)).namespace == "default"


def test_without_any_configuration_it_is_said_where_one_was_looked_for():
    assert refusal() == (
        "There is no kubeconfig: looked for ~/.kube/config, and this is no pod of a cluster. "
        "Name the file with --kubeconfig or KUBECONFIG; kubectl cluster-info shows whether it is good."
    )


def test_a_file_that_is_named_must_be_there(tmp_path: Path):
    missing = tmp_path / "missing"
    assert refusal(kubeconfig=str(missing)) == (f"{missing} does not exist. Name a kubeconfig file with --kubeconfig.")


def test_broken_yaml_is_told_with_its_line(tmp_path: Path):
    file = tmp_path / "config"
    file.write_text(f"apiVersion: v1\nusers: [{{token: {TOKEN}}}\n")
    assert refusal(kubeconfig=str(file)).startswith(f"{file} is no kubeconfig: line 3: ")


def test_a_file_of_another_shape_is_told(tmp_path: Path):
    file = tmp_path / "config"
    file.write_text("- a\n- b\n")
    assert refusal(kubeconfig=str(file)) == (
        f"{file} is no kubeconfig: expected a mapping with clusters, contexts and users."
    )


def test_an_entry_without_a_name_is_told(tmp_path: Path):
    file = config(tmp_path / "config", users=[{"user": {"token": TOKEN}}])
    assert refusal(kubeconfig=str(file)) == f"{file} is no kubeconfig: an entry of users has no name."


def test_without_a_current_context_the_contexts_are_named(tmp_path: Path):
    content = whole("http://a:1") | {"current-context": ""}
    file = config(tmp_path / "config", **content)
    assert refusal(kubeconfig=str(file)) == (
        f"{file} names no current context. Choose one with --context or kubectl config use-context: a."
    )


def test_an_unknown_context_is_told_with_those_that_are_there(tmp_path: Path):
    file = config(tmp_path / "config", **whole("http://a:1"))
    assert refusal(kubeconfig=str(file), context="b") == (
        f"{file} has not the context b: 'b' is none of its contexts (a)."
    )


def test_a_context_whose_cluster_is_missing_is_told(tmp_path: Path):
    file = config(tmp_path / "config", **(whole("http://a:1") | {"clusters": []}))
    assert refusal(kubeconfig=str(file)) == (
        f"{file} has not the cluster of the context a: 'a' is none of its clusters (it has none)."
    )


def test_a_context_whose_user_is_missing_is_told(tmp_path: Path):
    file = config(tmp_path / "config", **(whole("http://a:1") | {"users": []}))
    assert refusal(kubeconfig=str(file)) == (
        f"{file} has not the user of the context a: 'a' is none of its users (it has none)."
    )


def test_a_cluster_without_a_server_is_told(tmp_path: Path):
    content = whole("http://a:1") | {"clusters": [entry("cluster", "a", **{"insecure-skip-tls-verify": True})]}
    file = config(tmp_path / "config", **content)
    assert refusal(kubeconfig=str(file)) == f"{file}: the cluster a has no server. Expected its URL."


def test_a_certificate_that_is_no_base64_is_told(tmp_path: Path):
    user = {"client-certificate-data": "abc", "client-key-data": "abc"}
    file = config(tmp_path / "config", **whole("https://a:1", **user))
    told = refusal(kubeconfig=str(file))
    assert told.startswith(f"{file} can't be used: context a: ")


def test_a_certificate_that_is_missing_is_named(tmp_path: Path):
    user = {"client-certificate": "client.pem", "client-key": "client.key"}
    file = config(tmp_path / "config", **whole("https://a:1", **user))
    assert refusal(kubeconfig=str(file)) == (
        f"{file} can't be used: context a: File does not exist: {tmp_path / 'client.pem'}."
    )


# ── Logins ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_token_file_is_relative_to_its_own_file_and_may_end_with_a_newline(api_server: ApiServer, tmp_path: Path):
    content = whole(api_server.url, tokenFile="secret/token")
    users = config(tmp_path / "users" / "config", users=content.pop("users"))
    (tmp_path / "users" / "secret").mkdir()
    (tmp_path / "users" / "secret" / "token").write_text(TOKEN + "\n")
    rest = config(tmp_path / "rest" / "config", **content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", f"{rest}{os.pathsep}{users}")
        assert opened().list("Job") == []


def test_a_token_file_that_is_missing_is_named(api_server: ApiServer, tmp_path: Path):
    file = config(tmp_path / "config", **whole(api_server.url, tokenFile="token"))
    assert refusal(kubeconfig=str(file)) == (
        f"{file}: tokenFile can't be read: [Errno 2] No such file or directory: '{tmp_path / 'token'}'"
    )


def test_a_token_that_no_header_may_hold_is_told_without_the_token(api_server: ApiServer, tmp_path: Path):
    file = config(tmp_path / "config", **whole(api_server.url, token=f"{TOKEN}\nmore"))
    assert refusal(kubeconfig=str(file)) == (
        "The token of the context a holds a newline or another character that none may hold. "
        "Log in again as you do for kubectl."
    )


def test_name_and_password_are_sent(api_server: ApiServer, tmp_path: Path):
    file = config(tmp_path / "config", **whole(api_server.url, username="alice", password="secret"))
    assert "does not accept" in refusal(kubeconfig=str(file))
    assert api_server.requests[-1].headers["authorization"] == "Basic YWxpY2U6c2VjcmV0"


def test_impersonation_is_passed_on(api_server: ApiServer, tmp_path: Path):
    content = whole(api_server.url, token=TOKEN, **{"as": "robot"})
    opened(kubeconfig=str(config(tmp_path / "config", **content))).list("Job")
    assert api_server.requests[-1].headers["Impersonate-User"] == "robot"


def test_impersonated_groups_are_refused(api_server: ApiServer, tmp_path: Path):
    content = whole(api_server.url, token=TOKEN, **{"as": "robot", "as-groups": ["admins"]})
    file = config(tmp_path / "config", **content)
    assert refusal(kubeconfig=str(file)) == (f"{file}: the user a impersonates groups (as-groups); only `as` is known.")


PLUGIN = """#!/bin/sh
echo run >> "$LOG"
{fails}
printf '{{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{{"token":"%s"%s}}}}' \
  "$(cat "$TOKEN_FILE")" "$(cat "$EXPIRY_FILE" 2>/dev/null)"
"""


@pytest.fixture
def plugin(api_server: ApiServer, tmp_path: Path) -> Callable[..., Path]:
    """Write a kubeconfig whose user is a plugin beside it; `token` and `expiry` beside it say what it answers."""

    def write(fails: str = "", **more: Any) -> Path:
        folder = tmp_path / "cloud"
        folder.mkdir()
        script = folder / "bin" / "login"
        script.parent.mkdir()
        script.write_text(PLUGIN.format(fails=fails))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        (folder / "token").write_text(TOKEN)
        files = {"LOG": "log", "TOKEN_FILE": "token", "EXPIRY_FILE": "expiry"}
        env = [{"name": name, "value": str(folder / file)} for name, file in files.items()]
        command = {"apiVersion": "client.authentication.k8s.io/v1", "command": "./bin/login", "env": env, **more}
        command["interactiveMode"] = "Never"
        return config(folder / "config", **whole(api_server.url, exec=command))

    return write


def calls(file: Path) -> int:
    return (file.parent / "log").read_text().count("run")


def test_a_plugin_beside_the_file_gives_the_login_once(plugin: Callable[..., Path]):
    file = plugin()
    cluster = opened(kubeconfig=str(file))
    assert cluster.list("Job") == []
    assert cluster.list("Pod") == []
    assert calls(file) == 1


def test_a_login_that_is_about_to_end_is_renewed_by_its_plugin(api_server: ApiServer, plugin: Callable[..., Path]):
    file = plugin()
    soon = (datetime.now(UTC) + timedelta(seconds=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    (file.parent / "expiry").write_text(f',"expirationTimestamp":"{soon}"')
    (file.parent / "token").write_text("first")
    cluster = opened(kubeconfig=str(file))
    (file.parent / "token").write_text(TOKEN)
    assert cluster.list("Job") == []
    assert [each.code for each in api_server.requests] == [200]


def test_a_login_that_the_server_no_longer_takes_is_renewed_once(api_server: ApiServer, plugin: Callable[..., Path]):
    file = plugin()
    (file.parent / "token").write_text("old")
    cluster = opened(kubeconfig=str(file))
    (file.parent / "token").write_text(TOKEN)
    assert cluster.list("Job") == []
    assert [each.code for each in api_server.requests] == [401, 200]
    assert calls(file) == 2


def test_a_login_that_stays_wrong_is_told(api_server: ApiServer, plugin: Callable[..., Path]):
    file = plugin()
    (file.parent / "token").write_text("wrong")
    assert refusal(kubeconfig=str(file)) == (
        f"{api_server.url} does not accept the context a (401: Unauthorized). "
        "Log in again as you do for kubectl, or choose another context with --context."
    )
    assert [each.code for each in api_server.requests] == [401]


def test_a_plugin_that_fails_is_told_with_what_it_said(plugin: Callable[..., Path], capfd: pytest.CaptureFixture[str]):
    file = plugin(fails="echo 'SSO session has expired' >&2; exit 3")
    assert refusal(kubeconfig=str(file)) == (
        f"{file}: the login of the context a failed: exec: process returned 3. SSO session has expired. "
        "Log in again as you do for kubectl."
    )
    assert capfd.readouterr() == ("", "")


def test_a_plugin_that_is_not_installed_is_told_with_its_hint(plugin: Callable[..., Path]):
    file = plugin(command="cloud-login-of-nobody", installHint="Install it\nfrom the cloud.")
    assert refusal(kubeconfig=str(file)) == (
        f"{file}: the login of the context a failed: [Errno 2] No such file or directory: 'cloud-login-of-nobody'. "
        "Install it from the cloud."
    )


def test_a_plugin_that_fails_later_is_told(plugin: Callable[..., Path], capfd: pytest.CaptureFixture[str]):
    file = plugin()
    soon = (datetime.now(UTC) + timedelta(seconds=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    (file.parent / "expiry").write_text(f',"expirationTimestamp":"{soon}"')
    cluster = opened(kubeconfig=str(file))
    (file.parent / "bin" / "login").write_text("#!/bin/sh\necho logged out >&2\nexit 1\n")
    with pytest.raises(SettingError) as caught:
        cluster.list("Job")
    assert str(caught.value) == (
        "The login of the context a failed: exec: process returned 1. logged out. Log in again as you do for kubectl."
    )
    assert capfd.readouterr() == ("", "")


def test_a_token_that_is_renewed_in_vain_is_told(
    api_server: ApiServer, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
):
    """Such as that of a pod whose file has been emptied: the client reads it anew every minute."""
    cluster = opened(kubeconfig=str(kubeconfig))

    def renew(_: object) -> None:
        raise ConfigException("Token file exists but empty.")

    cluster._api.connection.client.configuration.refresh_api_key_hook = renew
    with pytest.raises(SettingError) as caught:
        cluster.list("Job")
    assert str(caught.value) == (
        "The login of the context tests failed: Token file exists but empty. Log in again as you do for kubectl."
    )


# ── Proxies ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_loopback_address_is_reached_without_the_proxy_of_the_environment(
    cluster_file: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert opened(kubeconfig=str(cluster_file)).list("Job") == []


def test_another_address_is_reached_through_the_proxy_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with ApiServer(token=None) as server:
        monkeypatch.setenv("http_proxy", server.url)
        monkeypatch.setenv("no_proxy", "localhost")
        file = config(tmp_path / "config", **whole("http://cluster.invalid"))
        assert opened(kubeconfig=str(file)).list("Job") == []
        assert server.requests[-1].headers["Host"] == "cluster.invalid"


def test_the_proxy_of_the_kubeconfig_counts_for_every_address(
    api_server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("no_proxy", "*")
    content = whole("http://127.0.0.1:9")
    content["clusters"][0]["cluster"]["proxy-url"] = api_server.url
    assert opened(kubeconfig=str(config(tmp_path / "config", **content))).list("Job") == []
    assert api_server.requests[-1].headers["Host"] == "127.0.0.1:9"


@pytest.fixture
def cluster_file(api_server: ApiServer, tmp_path: Path) -> Path:
    return api_server.kubeconfig(tmp_path / "config")
