"""URL policy: hosts that may be reached over plain HTTP, and hosts that are never contacted."""

import ipaddress
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from topwork.errors import SettingError

ALLOW_HTTP_VARIABLE = "TOPWORK_ALLOW_HTTP"
"""Environment variable that lists the hosts to which plain HTTP is allowed, separated by commas."""

_CLUSTER_NAME = re.compile(r"[^.]+|.+\.localhost|.+\.svc|.+\.svc\..+|.+\.cluster\.local", re.IGNORECASE)
# Cloud metadata services hand out credentials to every process on the machine. Their addresses are link-local, except
# for these two: Alibaba Cloud, and AWS over IPv6.
_METADATA_NAMES = frozenset({"metadata", "metadata.google.internal", "metadata.goog", "instance-data.ec2.internal"})
_METADATA_ADDRESSES = frozenset(map(ipaddress.ip_address, ("100.100.100.200", "fd00:ec2::254")))
_PRIVATE_NETWORKS = tuple(
    map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "fc00::/7", "::1/128"))
)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_allowed_hosts: frozenset[str] = frozenset()


def allow_plain_http(hosts: Iterable[str]) -> None:
    """Allow plain HTTP to hosts on public networks. The command line calls this once, with the user's list.

    Args:
        hosts: Host names or addresses, without a port.
    """
    global _allowed_hosts  # noqa: PLW0603 - a process-wide setting, like the trusted certificate authorities
    _allowed_hosts = frozenset(host.strip().lower() for host in hosts if host.strip())


def check_plain_http(url: str, subject: str) -> None:
    """Reject plain HTTP to a host on a public network, where others can read and change the traffic.

    Plain HTTP is allowed to loopback and private addresses (RFC 1918, RFC 4193), to names that resolve only to such
    addresses (`<service>.<namespace>`), to names without a dot, and to cluster names (`*.svc`, `*.svc.*`,
    `*.cluster.local`).

    Args:
        url: Any URL. URLs with a scheme other than http are accepted.
        subject: Describes the URL at the start of the error message.

    Raises:
        SettingError: If plain HTTP to the host is not allowed.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if parts.scheme.lower() != "http" or host in _allowed_hosts or _is_private_host(host):
        return
    raise SettingError(
        f"{subject} is plain HTTP to {host}, which is outside this machine, the cluster and private networks. Others "
        f"could read and change the traffic. Use https://, or allow it with {ALLOW_HTTP_VARIABLE}={host} in the "
        "environment (for a Job: in the Secret topwork-s3)."
    )


def is_forbidden_host(host: str) -> bool:
    """Return whether a host is link-local, multicast or a cloud metadata service.

    Such hosts hand out credentials and never serve datasets.

    Args:
        host: Name or IP address. Names are not resolved.
    """
    address = _parse_address(host.rstrip("."))
    if address is None:
        return host.rstrip(".").lower() in _METADATA_NAMES
    return address.is_link_local or address.is_multicast or address in _METADATA_ADDRESSES


def _is_private_host(host: str) -> bool:
    if (address := _parse_address(host)) is not None:
        return _is_private_address(address)
    return _CLUSTER_NAME.fullmatch(host) is not None or _resolves_to_private_addresses(host)


def _is_private_address(address: Address) -> bool:
    return any(address in network for network in _PRIVATE_NETWORKS if network.version == address.version)


def _resolves_to_private_addresses(host: str) -> bool:
    try:
        resolved = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    return all((address := _parse_address(text)) is not None and _is_private_address(address) for text in resolved)


def _parse_address(host: str) -> Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    # An IPv4-mapped address such as ::ffff:169.254.169.254 reaches the embedded IPv4 address.
    return getattr(address, "ipv4_mapped", None) or address
