"""Addresses of nodes: host:port, with an IPv6 address in brackets."""

import ipaddress
import socket
import time
from contextlib import suppress

from topwork.errors import SettingError, UnavailableError
from topwork.nodes.connection import describe_error

CONNECT_SECONDS = 5.0
BIND_SECONDS = 30.0
"""Time for an earlier process of this node to release its port."""


def split_address(address: str) -> tuple[str, int]:
    """Split an address into its host and port.

    Args:
        address: host:port; an IPv6 address is in brackets, such as [fd00::1]:9112.

    Raises:
        SettingError: If it has another form.

    Example:
        >>> split_address("[fd00::1]:9112")
        ('fd00::1', 9112)
    """
    host, separator, port = address.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if is_bracketed:
        host = host[1:-1]
    is_valid_port = port.isascii() and port.isdigit() and 0 < int(port) < 65536
    if not separator or not host or not is_valid_port or (":" in host) != is_bracketed:
        raise SettingError(
            f"{address!r} is not an address of a node: expected host:port, such as cats-0.cats:9112 or [fd00::1]:9112."
        )
    return host, int(port)


def listen(address: str) -> socket.socket:
    """Listen at an address.

    Args:
        address: host:port. On a loopback address, only processes of this machine can connect; otherwise the socket
            listens on all interfaces, because the name of a pod may not resolve yet.

    Raises:
        UnavailableError: If the port remains in use.
    """
    host, port = split_address(address)
    deadline = time.monotonic() + BIND_SECONDS
    while True:
        try:
            return _bind(host, port)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"Cannot listen at {address} for the other nodes ({describe_error(error)}). Another process of "
                    "this machine uses the port, or may not be allowed to."
                ) from error
        time.sleep(0.2)


def _bind(host: str, port: int) -> socket.socket:
    if _is_loopback(host):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    if socket.has_dualstack_ipv6():
        # IPv6 can be disabled on a machine whose kernel supports it.
        with suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=128, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=128)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def connect(address: str) -> socket.socket:
    """Connect to an address.

    Raises:
        OSError: If the name does not resolve, or nothing listens there.
    """
    sock = socket.create_connection(split_address(address), CONNECT_SECONDS)
    # Without a listener, a connection from an ephemeral port to itself succeeds now and then.
    if sock.getsockname() == sock.getpeername():
        sock.close()
        raise ConnectionRefusedError(111, "Connection refused")
    return sock


def resolve(address: str) -> str | None:
    """Return why the host of an address does not resolve; None if it does."""
    host, port = split_address(address)
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return describe_error(error)
    return None
