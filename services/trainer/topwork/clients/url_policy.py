"""To which hosts this process speaks without encryption, and to which it never speaks."""

import ipaddress
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from topwork.errors import SettingError

VARIABLE = "TOPWORK_ALLOW_HTTP"
"""Environment variable with the hosts, separated by commas, to which plain HTTP is allowed."""

_IN_CLUSTER = re.compile(r"[^.]+|.+\.localhost|.+\.svc|.+\.svc\..+|.+\.cluster\.local", re.IGNORECASE)
# Names of the services that hand credentials to whoever runs on a machine of a cloud. Their addresses are link-local,
# but for these two: Alibaba's, and Amazon's over IPv6.
_METADATA_NAMES = frozenset({"metadata", "metadata.google.internal", "metadata.goog", "instance-data.ec2.internal"})
_METADATA_ADDRESSES = frozenset(map(ipaddress.ip_address, ("100.100.100.200", "fd00:ec2::254")))
_PRIVATE = tuple(
    map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "fc00::/7", "::1/128"))
)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_allowed: frozenset[str] = frozenset()


def allow_plain_http(hosts: Iterable[str]) -> None:
    """Allow plain HTTP to hosts on the open network; called once, by the command line, with what a person allowed.

    Args:
        hosts: Host names or addresses, without port.
    """
    global _allowed  # noqa: PLW0603 - a setting of the process, as the authorities of TLS are
    _allowed = frozenset(host.strip().lower() for host in hosts if host.strip())


def check_plain_http(url: str, what: str) -> None:
    """Refuse plain HTTP to a host on the open network: whoever is on the way reads and changes what is said.

    Loopback, private addresses (RFC 1918, RFC 4193), names that lead to such addresses alone (`<service>.<namespace>`),
    names of one label and names of a cluster (`*.svc`, `*.svc.*`, `*.cluster.local`) are no open network.

    Args:
        url: Any URL; others than http:// pass.
        what: What it is the address of, for the error.

    Raises:
        SettingError: If it is not allowed.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if parts.scheme.lower() != "http" or host in _allowed or _is_near(host):
        return
    raise SettingError(
        f"{what} is plain HTTP to {host}, which is neither on this machine nor in a cluster or private network: what "
        f"is sent can be read and changed on its way. Use https://, or allow it with {VARIABLE}={host} in the "
        "environment (of a Job: in the Secret topwork-s3)."
    )


def _is_near(host: str) -> bool:
    if (address := _as_address(host)) is not None:
        return _is_private(address)
    return _IN_CLUSTER.fullmatch(host) is not None or _leads_near(host)


def _is_private(address: Address) -> bool:
    return any(address in network for network in _PRIVATE if network.version == address.version)


def _leads_near(host: str) -> bool:
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    return all((address := _as_address(one)) is not None and _is_private(address) for one in found)


def is_forbidden(host: str) -> bool:
    """Whether a host is the metadata service of a cloud or link-local, where no data set lies but credentials do.

    Args:
        host: Name or address; a name is not looked up.
    """
    address = _as_address(host.rstrip("."))
    if address is None:
        return host.rstrip(".").lower() in _METADATA_NAMES
    return address.is_link_local or address.is_multicast or address in _METADATA_ADDRESSES


def _as_address(host: str) -> Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    # ::ffff:169.254.169.254 is the IPv4 address that it holds.
    return getattr(address, "ipv4_mapped", None) or address
