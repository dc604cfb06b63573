"""kubeconfig files, merged and resolved as kubectl does, and credentials from exec plugins."""

# Files are read and merged here, because kubernetes.config.KubeConfigMerger takes current-context from the last file
# instead of the first, rejects an empty file, keeps the newline at the end of a tokenFile, and does not report the file
# and line of an error. ExecProvider is called directly, because KubeConfigLoader only logs that a plugin failed and
# then sends requests without credentials. The loader handles everything else: certificates, tokens and auth providers.

import base64
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from kubernetes.client import Configuration
from kubernetes.config import ConfigException
from kubernetes.config.dateutil import parse_rfc3339
from kubernetes.config.exec_provider import ExecProvider
from kubernetes.config.kube_config import ConfigNode, load_kube_config_from_dict
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from topwork.clients.kubernetes.errors import LOG_IN
from topwork.errors import SettingError

# A credential from an exec plugin is renewed this long before it expires.
RENEWAL_MARGIN = timedelta(minutes=5)
LISTS = ("clusters", "contexts", "users")


@dataclass(frozen=True)
class Entry:
    """A named cluster, context or user.

    Attributes:
        name: Name of the entry.
        content: The cluster, context or user.
        file: The file that contains it; paths in `content` are relative to its directory.
    """

    name: str
    content: dict[str, Any]
    file: Path

    def node(self, kind: str) -> ConfigNode:
        """Return the entry in the form that the official loader expects, with the file that paths are relative to."""
        return ConfigNode(f"{kind}[name={self.name}]", {"name": self.name, kind: self.content}, str(self.file))


class Kubeconfig:
    """Merged kubeconfig files. The first file that contains a name, or a current-context, takes precedence.

    Args:
        files: Existing files.

    Raises:
        SettingError: If a file is not a kubeconfig.
    """

    def __init__(self, files: list[Path]) -> None:
        self.source = ", ".join(map(str, files))
        self.current_context = ""
        self._entries: dict[str, dict[str, Entry]] = {kind: {} for kind in LISTS}
        for file in files:
            content = _read(file)
            self.current_context = self.current_context or content.get("current-context") or ""
            for kind, entries in self._entries.items():
                for item in content.get(kind) or []:
                    if not isinstance(item, dict) or not item.get("name"):
                        raise SettingError(f"{file} is not a kubeconfig: an entry of {kind} has no name.")
                    entries.setdefault(item["name"], Entry(item["name"], item.get(kind[:-1]) or {}, file))

    def find(self, kind: str, name: str, description: str) -> Entry:
        """Return an entry by its name.

        Args:
            kind: clusters, contexts or users.
            name: Name of the entry.
            description: Description of the entry, for the error message.

        Raises:
            SettingError: If there is no such entry.
        """
        entries = self._entries[kind]
        if name not in entries:
            raise SettingError(
                f"{self.source} does not contain {description}: {name!r} is not in {kind} "
                f"({', '.join(entries) or 'which is empty'})."
            )
        return entries[name]

    def find_context(self, name: str | None) -> Entry:
        """Return a context by its name, or the current one if the name is None.

        Raises:
            SettingError: If there is no such context, or no current one.
        """
        if name := name or self.current_context:
            return self.find("contexts", name, f"context {name}")
        raise SettingError(
            f"{self.source} sets no current context. Choose one with --context or kubectl config use-context: "
            f"{', '.join(self._entries['contexts']) or 'the file has no contexts'}."
        )


@dataclass(frozen=True)
class ResolvedContext:
    """A context with its cluster and user.

    Attributes:
        source: The kubeconfig files, for error messages.
        context: The context.
        cluster: Its cluster.
        user: Its user; None if the context has none.
    """

    source: str
    context: Entry
    cluster: Entry
    user: Entry | None

    def load(self, configuration: Configuration) -> None:
        """Set server, certificates and credentials in a client configuration.

        Raises:
            SettingError: If a certificate, a token file or the exec plugin can't be used.
        """
        user = dict(self.user.content) if self.user else {}
        file = self.user.file if self.user else self.context.file
        plugin = None
        if user.get("tokenFile"):
            user["token"] = _read_token(file, user.pop("tokenFile"))
        if (exec_config := user.pop("exec", None)) and not user.get("token"):
            plugin = ExecPlugin(exec_config, file, self.cluster, f"{self.source}: login of context {self.context.name}")
            user |= plugin.run()
        try:
            load_kube_config_from_dict(self._minified(user, file), self.context.name, configuration, False)
        except (ConfigException, ValueError, KeyError, TypeError, OSError) as error:
            raise SettingError(f"{self.source} can't be used: context {self.context.name}: {_flat(error)}.") from error
        if plugin:
            configuration.refresh_api_key_hook = plugin.renew

    def _minified(self, user: dict[str, Any], file: Path) -> ConfigNode:
        """Return a kubeconfig with only this context, like `kubectl config view --minify`."""
        content: dict[str, Any] = {
            "contexts": [self.context.node("context")],
            "clusters": [self.cluster.node("cluster")],
        }
        content["users"] = [Entry(self.user.name, user, file).node("user")] if self.user else []
        return ConfigNode("kubeconfig", content | {"current-context": self.context.name})


def resolve_context(files: list[Path], name: str | None) -> ResolvedContext:
    """Find a context with its cluster and user in kubeconfig files.

    Args:
        files: Existing files.
        name: Name of the context; None for the current one.

    Raises:
        SettingError: If a file is not a kubeconfig, or it has no such context, cluster or user.
    """
    kubeconfig = Kubeconfig(files)
    context = kubeconfig.find_context(name)
    cluster = kubeconfig.find(
        "clusters", context.content.get("cluster") or "", f"the cluster of context {context.name}"
    )
    user = None
    if user_name := context.content.get("user"):
        user = kubeconfig.find("users", user_name, f"the user of context {context.name}")
        if user.content.get("as-groups") or user.content.get("as-user-extra"):
            raise SettingError(
                f"{kubeconfig.source}: user {user_name} impersonates groups (as-groups). Only `as` is supported."
            )
    if not cluster.content.get("server"):
        raise SettingError(f"{kubeconfig.source}: cluster {cluster.name} has no server. Expected its URL.")
    return ResolvedContext(kubeconfig.source, context, cluster, user)


class ExecPlugin:
    """An exec credential plugin, such as those of cloud providers; it runs again before its credential expires.

    Args:
        config: The `exec` section of the user.
        file: The kubeconfig file; a command with a slash is relative to its directory.
        cluster: The cluster, which a plugin with `provideClusterInfo` receives.
        description: Describes the login in error messages.
    """

    def __init__(self, config: dict[str, Any], file: Path, cluster: Entry, description: str) -> None:
        command = config.get("command") or ""
        if "/" in command:
            config = config | {"command": str(file.absolute().parent / command)}
        self._config = ConfigNode("exec", config)
        self._cluster = ConfigNode("cluster", dict(cluster.content))
        self._description = description
        self._install_hint = _flat(config.get("installHint") or "")
        self._expires_at: datetime | None = None

    def run(self) -> dict[str, str]:
        """Run the plugin.

        Returns:
            Its credential as a kubeconfig user: a token, a client certificate, or both.

        Raises:
            SettingError: If the plugin is not installed, fails, or returns no credential.
        """
        try:
            status = ExecProvider(self._config, None, self._cluster).run()
            expires_at = status.get("expirationTimestamp")
            self._expires_at = parse_rfc3339(expires_at) if expires_at else None
            return _credential(status)
        except (ConfigException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = _flat(error).rstrip(".")
            raise SettingError(f"{self._description} failed: {message}. {self._install_hint or LOG_IN}") from error

    def renew(self, configuration: Configuration) -> None:
        """Replace a token that expires soon; the client calls this before every request."""
        expires_soon = self._expires_at and datetime.now(UTC) >= self._expires_at - RENEWAL_MARGIN
        if expires_soon and (token := self.run().get("token")):
            configuration.api_key["BearerToken"] = f"Bearer {token}"


def _credential(status: dict[str, Any]) -> dict[str, str]:
    credential = {"token": status["token"]} if status.get("token") else {}
    if certificate := status.get("clientCertificateData"):
        if not status.get("clientKeyData"):
            raise ConfigException("exec: the plugin returned clientCertificateData without clientKeyData")
        for key, data in (("client-certificate-data", certificate), ("client-key-data", status["clientKeyData"])):
            credential[key] = base64.b64encode(data.encode()).decode()
    if not credential:
        raise ConfigException("exec: the plugin returned neither token nor clientCertificateData")
    return credential


def _read(file: Path) -> dict[str, Any]:
    try:
        content = YAML(typ="safe").load(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{file} can't be read: {error}") from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise SettingError(f"{file} is not a kubeconfig: {line}{getattr(error, 'problem', error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingError(f"{file} is not a kubeconfig: expected a mapping with clusters, contexts and users.")
    return content


def _read_token(file: Path, token_file: str) -> str:
    try:
        return (file.absolute().parent / token_file).read_text().strip()
    except OSError as error:
        raise SettingError(f"{file}: tokenFile can't be read: {error}") from error


def _flat(message: object) -> str:
    return " ".join(str(message).split())
