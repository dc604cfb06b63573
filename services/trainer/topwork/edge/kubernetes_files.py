"""kubeconfig files as kubectl reads them: several that are merged, each with paths of its own."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from topwork.errors import SettingError

# Keys of a kubeconfig that hold a path, which is relative to the file that it stands in.
PATHS = ("certificate-authority", "client-certificate", "client-key", "tokenFile")


def merge(files: list[Path]) -> dict[str, Any]:
    """Read kubeconfig files and merge them: of a name, and of current-context, the first file that has one counts.

    Args:
        files: Files that are there.

    Returns:
        One kubeconfig, with absolute paths.

    Raises:
        SettingError: If one of them is none.
    """
    merged: dict[str, Any] = {"apiVersion": "v1", "kind": "Config", "current-context": ""}
    lists: dict[str, dict[str, Any]] = {"clusters": {}, "contexts": {}, "users": {}}
    for file in files:
        content = _read(file)
        merged["current-context"] = merged["current-context"] or content.get("current-context") or ""
        for kind, entries in lists.items():
            for entry in content.get(kind) or []:
                if not isinstance(entry, dict) or not entry.get("name"):
                    raise SettingError(f"{file} is no kubeconfig: an entry of {kind} has no name.")
                entries.setdefault(entry["name"], entry | {kind[:-1]: _absolute(entry.get(kind[:-1]) or {}, file)})
    return merged | {kind: list(entries.values()) for kind, entries in lists.items()}


def _read(file: Path) -> dict[str, Any]:
    try:
        content = YAML(typ="safe").load(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{file} can't be read: {error}") from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise SettingError(f"{file} is no kubeconfig: {where}{getattr(error, 'problem', error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingError(f"{file} is no kubeconfig: expected a mapping with clusters, contexts and users.")
    return content


def _absolute(content: dict[str, Any], file: Path) -> dict[str, Any]:
    folder = file.absolute().parent
    found = content | {key: str(folder / content[key]) for key in PATHS if content.get(key)}
    command = (content.get("exec") or {}).get("command") or ""
    if "/" in command:  # a bare name is looked up in PATH
        found["exec"] = content["exec"] | {"command": str(folder / command)}
    if found.get("tokenFile"):  # the client would send the newline at its end, too
        try:
            found["token"] = Path(found.pop("tokenFile")).read_text().strip()
        except OSError as error:
            raise SettingError(f"{file}: tokenFile can't be read: {error}") from error
    return found


def named(merged: dict[str, Any], kind: str, name: str | None, what: str, where: str) -> dict[str, Any]:
    """Find an entry of a kubeconfig.

    Args:
        merged: The kubeconfig.
        kind: clusters, contexts or users.
        name: Name of the entry; None or empty is no context at all.
        what: What the entry is, for the message.
        where: Files, for the message.

    Raises:
        SettingError: If there is none of that name.
    """
    names = [entry["name"] for entry in merged[kind]]
    if not name:
        raise SettingError(
            f"{where} names no current context. Choose one with --context or kubectl config use-context: "
            f"{', '.join(names) or 'there is none'}."
        )
    for entry in merged[kind]:
        if entry["name"] == name:
            return dict(entry)
    raise SettingError(f"{where} has not {what}: {name!r} is none of its {kind} ({', '.join(names) or 'it has none'}).")
