"""Which of a node's addresses serving takes, on machines with several, one, or none of IPv4."""

import socket
from types import SimpleNamespace

import psutil
import pytest

from deepseek_sft.errors import BadInputError
from deepseek_sft.serving import node_addresses

LOOPBACK = {"lo": [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]}


@pytest.fixture
def machine(monkeypatch):
    """Gives this machine interfaces, and what its own name resolves to over IPv4."""

    def have(interfaces: dict[str, list], resolved: tuple[str, ...] = ()) -> None:
        listed = {
            name: [SimpleNamespace(family=family, address=address) for family, address in entries]
            for name, entries in (LOOPBACK | interfaces).items()
        }
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: listed)
        monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: SimpleNamespace(isup=True) for name in listed})
        found = [(None, None, None, "", (address, 0)) for address in resolved]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
        monkeypatch.setenv("SLURMD_NODENAME", "node1")

    return have


ETHERNET, INFINIBAND = ("eth0", [(socket.AF_INET, "10.0.0.1")]), ("ib0", [(socket.AF_INET, "10.1.0.1")])


def test_of_several_interfaces_the_one_of_the_nodes_name_is_taken(machine):
    machine(dict([ETHERNET, INFINIBAND]), resolved=("127.0.1.1", "10.1.0.1"))
    assert node_addresses.head_address(None) == "10.1.0.1"
    assert node_addresses.head_address("eth0") == "10.0.0.1"


def test_a_name_that_leads_nowhere_is_no_trouble_with_one_interface_and_asks_with_several(machine):
    machine(dict([ETHERNET]), resolved=("127.0.1.1",))
    assert node_addresses.head_address(None) == "10.0.0.1"
    machine(dict([ETHERNET, INFINIBAND]))
    with pytest.raises(BadInputError, match=r"it has several: 10\.0\.0\.1, 10\.1\.0\.1") as refused:
        node_addresses.head_address(None)
    assert "serve.network_interface" in refused.value.fix


def test_a_node_of_ipv6_alone_is_refused_instead_of_waited_for(machine):
    machine({"eth0": [(socket.AF_INET6, "fd00::1"), (socket.AF_INET6, "fe80::1%eth0")]})
    with pytest.raises(BadInputError, match=r"node1: it has addresses of IPv6 alone \(fd00::1\)") as refused:
        node_addresses.head_address(None)
    assert "serve.host: 127.0.0.1" in refused.value.fix


@pytest.mark.parametrize("interfaces", [{}, {"eth0": [(socket.AF_INET6, "fe80::1%eth0")]}])
def test_a_machine_without_a_network_serves_itself(machine, interfaces):
    machine(interfaces)
    assert node_addresses.head_address(None) == "127.0.0.1"
