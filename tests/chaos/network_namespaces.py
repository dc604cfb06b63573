"""Network namespaces for the nodes of a job, with a link to each other and one to object storage, which can go down.

      namespace of node 0                     namespace of node 1
    storage         nodes                    nodes         storage
       |              +------- switch ---------+              |
relay to the S3 server (in this namespace)    relay to the S3 server
"""

import os
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Literal
from urllib.parse import urlsplit

import pytest
from tests.chaos.node_processes import Place

Link = Literal["nodes", "storage"]


class Network:
    """The namespaces of the nodes.

    Attributes:
        places: Where the nodes run.
    """

    def __init__(self, count: int) -> None:
        self._id = f"tw{os.getpid()}"
        self._count = count
        self._switch = f"{self._id}-switch"
        self.places: list[Place] = []

    def set_link(self, node: int, link: Link, state: Literal["up", "down"]) -> None:
        """Plug or unplug a cable of a node at its far end: what is sent meanwhile is lost."""
        if link == "nodes":
            _ip("-n", self._switch, "link", "set", f"port{node}", state)
        else:
            _ip("link", "set", self._storage_interface(node), state)

    def create(self) -> None:
        """Create the namespaces and links."""
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge0", "up")
        for node in range(self._count):
            name, port, far_end = self._namespace(node), f"port{node}", self._storage_interface(node)
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "nodes", "netns", name)
            _ip("-n", self._switch, "link", "set", port, "master", "bridge0", "up")
            _ip("link", "add", far_end, "type", "veth", "peer", "name", "storage", "netns", name)
            _ip("address", "add", f"{self.storage_address(node)}/30", "dev", far_end)
            _ip("link", "set", far_end, "up")
            _ip("-n", name, "address", "add", f"{self._node_address(node)}/24", "dev", "nodes")
            _ip("-n", name, "address", "add", f"10.79.{node + 1}.2/30", "dev", "storage")
            _ip("-n", name, "link", "set", "nodes", "up")
            _ip("-n", name, "link", "set", "storage", "up")

    def delete(self) -> None:
        """Delete the namespaces, and with them their links."""
        for name in [self._switch, *map(self._namespace, range(self._count))]:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def place(self, node: int, port: int) -> Place:
        """Describe where a node runs, whose relay to the S3 server listens on a port."""
        endpoint = f"http://{self.storage_address(node)}:{port}"
        return Place(self._node_address(node), endpoint, f"/run/netns/{self._namespace(node)}")

    def storage_address(self, node: int) -> str:
        """Return the address of this namespace at the link to a node."""
        return f"10.79.{node + 1}.1"

    def _node_address(self, node: int) -> str:
        return f"10.79.0.{node + 1}"

    def _namespace(self, node: int) -> str:
        return f"{self._id}-node{node}"

    def _storage_interface(self, node: int) -> str:
        return f"{self._id}s{node}"


@contextmanager
def connected_namespaces(count: int, endpoint: str) -> Iterator[Network]:
    """Create a network namespace for each node; skips the test where that is not possible.

    Args:
        count: Number of nodes.
        endpoint: URL of the S3 server.
    """
    network = Network(count)
    with ExitStack() as stack:
        stack.callback(network.delete)
        try:
            network.create()
        except (OSError, subprocess.CalledProcessError) as error:
            output = error.stderr.decode().strip() if isinstance(error, subprocess.CalledProcessError) else error
            pytest.skip(f"needs network namespaces: run as root with iproute2 (container: CAP_SYS_ADMIN). {output}")
        for node in range(count):
            port = stack.enter_context(_relay(network.storage_address(node), endpoint))
            network.places.append(network.place(node, port))
        yield network


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def _relay(address: str, endpoint: str) -> Iterator[int]:
    """Forward a port of an address to a server, and yield the port."""
    target = urlsplit(endpoint)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError), socket.create_connection((target.hostname or "", target.port or 80)) as server:
                reader = threading.Thread(target=_copy, args=(server, self.request), daemon=True)
                reader.start()
                _copy(self.request, server)
                reader.join()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server((address, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copy what one side sends, until it closes its end or the connection fails."""
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for sock in (source, target):
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
