"""Addresses, interfaces and ports of a node: one address per node, used for everything."""

import errno
import os
import socket

import psutil

from ..errors import BadInputError
from ..slurm.nodes import address_of


def node_name() -> str:
    """Slurm's name of this node, or its host name outside Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


def interface_addresses() -> dict[str, list[str]]:
    """IPv4 addresses by interface, of the interfaces that are up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
        if name in up
    }


def interface_of(address: str) -> str:
    """Name of the interface that carries ``address``.

    Raises:
        BadInputError: no interface that is up has it.
    """
    for name, addresses in interface_addresses().items():
        if address in addresses:
            return name
    raise BadInputError(f"{node_name()}: no interface has the address {address}")


def address_towards(peer: str) -> str:
    """Address of this node from which ``peer`` is reached; sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return probe.getsockname()[0]


def interface_address(interface: str) -> str:
    """First IPv4 address of ``interface``.

    Raises:
        BadInputError: the interface is missing, down or has none; lists those that have.
    """
    known = {name: addresses for name, addresses in interface_addresses().items() if addresses}
    if interface not in known:
        listed = ", ".join(f"{name} ({addresses[0]})" for name, addresses in known.items())
        raise BadInputError(
            f"{node_name()}: network_interface {interface} is not up or has no IPv4 address",
            f"set serve.network_interface to one of: {listed}",
        )
    return known[interface][0]


def head_address(interface: str | None) -> str:
    """Address under which the other nodes reach this one: of ``interface``, else what this node's name resolves to.

    Raises:
        BadInputError: the name resolves to loopback only and several interfaces could be meant.
    """
    if interface:
        return interface_address(interface)
    local = {address for addresses in interface_addresses().values() for address in addresses}
    try:
        answers = socket.getaddrinfo(address_of(node_name()), None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        answers = []
    for *_, (address, _port) in answers:
        # Debian's /etc/hosts maps a machine's own name to 127.0.1.1, which other nodes cannot reach.
        if address in local and not address.startswith("127."):
            return address
    outside = sorted(address for address in local if not address.startswith("127."))
    if len(outside) == 1:
        return outside[0]
    if not outside:
        return _loopback()
    raise BadInputError(
        f"{node_name()}: its name resolves to no address of its own, and it has several: {', '.join(outside)}",
        "set serve.network_interface to the interface that connects the nodes",
    )


def _loopback() -> str:
    """Loopback, for a machine without a network.

    Raises:
        BadInputError: it has a network, but of IPv6 alone: others would wait for this node in vain.
    """
    found = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET6 and not entry.address.startswith(("fe80:", "::1"))
    ]
    if not found:
        return "127.0.0.1"
    raise BadInputError(
        f"{node_name()}: it has addresses of IPv6 alone ({found[0].partition('%')[0]}), and serving uses IPv4",
        "give the nodes IPv4 addresses on one interface, and name it in serve.network_interface; or, on one node, set "
        "serve.host: 127.0.0.1 and use a tunnel",
    )


def free_ports(address: str, count: int) -> list[int]:
    """Ports of ``address`` that nothing listens on right now, all different."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for each in sockets:
            each.bind((address, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def check_free(host: str, port: int) -> None:
    """Raises BadInputError where ``host``:``port`` cannot be listened at: taken, or no address of this node."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: closed connections may linger
        try:
            probe.bind((host, port))
        except PermissionError:
            raise BadInputError(f"{node_name()}: port {port} needs root", "set serve.port to one above 1023") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise BadInputError(
                    f"{node_name()}: port {port} of {host} is taken by another program",
                    "set serve.port to another one, or to 0 for a free one",
                ) from None
            raise BadInputError(
                f"{node_name()}: cannot listen at {host}: {error.strerror}",
                "set serve.host to null, or to an address of the node that runs the first task",
            ) from None


def is_open(address: str, port: int) -> bool:
    """Whether something accepts connections there."""
    try:
        with socket.create_connection((address, port), timeout=1):
            return True
    except OSError:
        return False
