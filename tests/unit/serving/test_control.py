"""How the nodes of a deployment find each other, and the ports they take."""

import socket
import time

import pytest

from deepseek_sft.errors import BadInputError
from deepseek_sft.serving import node_addresses, node_channel


def test_rendezvous_of_an_earlier_start_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    channel = node_channel.HeadChannel("127.0.0.1", tmp_path)
    try:
        assert node_channel.read_rendezvous(tmp_path)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert node_channel.read_rendezvous(tmp_path) is None
    finally:
        channel.close()


def test_stranger_without_the_token_is_not_let_in(tmp_path):
    channel = node_channel.HeadChannel("127.0.0.1", tmp_path)
    try:
        found = node_channel.read_rendezvous(tmp_path)
        assert (tmp_path / node_channel.RENDEZVOUS).stat().st_mode & 0o077 == 0
        stranger = node_channel.join_head(found | {"token": "guess"}, {"node": "evil"})
        stranger.send({"event": "failure", "reports": []})
        time.sleep(0.1)
        assert channel.poll() == []
        assert channel.hellos == {}
    finally:
        channel.close()


def test_message_sent_right_after_the_hello_is_not_lost(tmp_path):
    channel = node_channel.HeadChannel("127.0.0.1", tmp_path)
    try:
        worker = node_channel.join_head(node_channel.read_rendezvous(tmp_path), {"node": "n1"})
        worker.send({"event": "failure", "reports": [1]})
        worker.close()
        deadline, messages = time.monotonic() + 20, []
        while not (messages and channel.gone) and time.monotonic() < deadline:
            messages += channel.poll()
        assert messages == [{"event": "failure", "reports": [1]}]
        assert list(channel.hellos) == channel.gone == ["n1"]
    finally:
        channel.close()


def test_free_ports_are_distinct_and_free():
    ports = node_addresses.free_ports("127.0.0.1", 5)
    assert len(set(ports)) == 5
    assert not any(node_addresses.is_open("127.0.0.1", port) for port in ports)


def test_taken_port_is_told_with_the_setting_to_change():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BadInputError, match=f"port {port} of 127.0.0.1 is taken") as raised:
            node_addresses.check_free("127.0.0.1", port)
    assert "serve.port" in raised.value.fix
    node_addresses.check_free("127.0.0.1", port)


def test_address_of_another_machine_is_told():
    with pytest.raises(BadInputError, match=r"cannot listen at 192\.0\.2\.1"):
        node_addresses.check_free("192.0.2.1", 0)
