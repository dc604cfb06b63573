"""Network namespaces on this machine with limited bandwidth and added latency, for `benchmarks/scaling.py`.

Bandwidth is limited by the queueing discipline tbf of Linux. Latency is added by this process: the interface of each
namespace is a TUN device, and packets between two of them are forwarded after a delay. The queueing discipline netem
would do that too, but many kernels don't have it.
"""

import fcntl
import heapq
import os
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
MTU = 9000
PREFIX = "topwork-bench"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class Network:
    """Network namespaces: `name(0)` with the address `address(0)`, etc."""

    def __init__(self, nodes: int, interfaces: list[str]) -> None:
        self.nodes = nodes
        self._interfaces = interfaces

    @staticmethod
    def name(index: int) -> str:
        """Return the name of a namespace."""
        return f"{PREFIX}-{os.getpid()}-{index}"

    @staticmethod
    def address(index: int) -> str:
        """Return the address of a namespace."""
        return f"10.77.0.{index + 1}"

    def limit(self, bits_per_second: float | None) -> None:
        """Limit what each node sends, or lift the limit."""
        for index, interface in enumerate(self._interfaces):
            tc = ["tc", "-n", self.name(index), "qdisc"]
            subprocess.run([*tc, "del", "dev", interface, "root"], check=False, capture_output=True)
            if bits_per_second is not None:
                rate = ["rate", f"{bits_per_second:.0f}bit", "burst", "256kb", "latency", "200ms"]
                subprocess.run([*tc, "add", "dev", interface, "root", "tbf", *rate], check=True)


@contextmanager
def bridged_network(nodes: int) -> Iterator[Network]:
    """Connect namespaces by pairs of virtual Ethernet devices and a bridge."""
    bridge = f"{PREFIX}-{os.getpid()}-bridge"
    namespaces = [bridge, *(Network.name(index) for index in range(nodes))]
    try:
        for namespace in namespaces:
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", bridge, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "bridge0", "up")
        for index in range(nodes):
            name = Network.name(index)
            _ip("-n", bridge, "link", "add", f"port{index}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", bridge, "link", "set", f"port{index}", "master", "bridge0", "up")
            _ip("-n", name, "address", "add", f"{Network.address(index)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        yield Network(nodes, ["eth0"] * nodes)
    finally:
        _delete(namespaces)


@contextmanager
def delayed_network(latency_seconds: float) -> Iterator[Network]:
    """Connect two namespaces by a link that delivers each packet after a delay."""
    namespaces = [Network.name(index) for index in range(2)]
    devices: list[int] = []
    try:
        for index, namespace in enumerate(namespaces):
            interface = f"tun{index}"
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
            devices.append(os.open("/dev/net/tun", os.O_RDWR))
            fcntl.ioctl(devices[index], TUNSETIFF, struct.pack("16sH", interface.encode(), IFF_TUN | IFF_NO_PI))
            _ip("link", "set", interface, "netns", namespace)
            local, peer = Network.address(index), Network.address(1 - index)
            _ip("-n", namespace, "address", "add", local, "peer", peer, "dev", interface)
            _ip("-n", namespace, "link", "set", interface, "mtu", str(MTU), "txqueuelen", "10000", "up")
        for source, target in (devices, devices[::-1]):
            threading.Thread(target=_forward, args=(source, target, latency_seconds), daemon=True).start()
        yield Network(2, ["tun0", "tun1"])
    finally:
        _delete(namespaces)


def _forward(source: int, target: int, latency_seconds: float) -> None:
    """Deliver packets after a delay, until the device is gone."""
    packets: list[tuple[float, bytes]] = []
    arrived = threading.Condition()

    def deliver() -> None:
        while True:
            with arrived:
                while not packets:
                    arrived.wait()
                due, packet = packets[0]
                wait = due - time.perf_counter()
                if wait <= 0:
                    heapq.heappop(packets)
            if wait > 0:
                time.sleep(wait)
                continue
            try:
                os.write(target, packet)
            except OSError:
                return

    threading.Thread(target=deliver, daemon=True).start()
    while True:
        try:
            packet = os.read(source, 65536)
        except OSError:
            return
        with arrived:
            heapq.heappush(packets, (time.perf_counter() + latency_seconds, packet))
            arrived.notify()


def _delete(namespaces: list[str]) -> None:
    for namespace in namespaces:
        subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)
