"""Promises of the checks that a node makes by itself, and of the service by which nodes talk."""

import contextlib
import json
import os
import shutil
import socket
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from deepseek_sft.errors import BadInputError
from deepseek_sft.preflight import exchange, gpu_state, machine, network, own_disk, settings, software
from deepseek_sft.preflight.exchange import Folder, Service
from deepseek_sft.preflight.settings import Needs, Settings

GB = 10**9


def proc(folder: Path, available: int) -> Path:
    folder.mkdir()
    (folder / "meminfo").write_text(f"MemTotal: 999 kB\nMemAvailable: {available // 1024} kB\nSwapFree: 0 kB\n")
    return folder


def test_memory_below_the_plan_fails_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    found = machine.host_memory(Needs(host=500 * GB), proc(tmp_path / "proc", 400 * GB))
    assert found.passed is False
    assert "372.53 GiB free on the machine, the plan needs 465.66 GiB" in found.detail
    assert machine.host_memory(Needs(host=300 * GB), tmp_path / "proc").passed is True
    assert machine.host_memory(Needs(), tmp_path / "proc").passed is None


def test_memory_that_slurm_gives_counts_where_it_is_less(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1000")
    found = machine.host_memory(Needs(host=2 * GB), proc(tmp_path / "proc", 400 * GB))
    assert found.passed is False
    assert "given to the job by Slurm" in found.detail


def of_disk(monkeypatch, free: int, inodes: int = 10**6) -> None:
    usage = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096, f_files=10**7, f_favail=inodes)
    monkeypatch.setattr(machine.os, "statvfs", lambda folder: usage)


def test_disk_counts_what_is_there_already_but_always_wants_room_for_one_checkpoint(tmp_path, monkeypatch):
    of_disk(monkeypatch, 100 << 20)
    (tmp_path / "checkpoint").write_bytes(bytes(8 << 20))
    assert machine.disk(Needs(disk=107 << 20), tmp_path, 2).passed is True
    assert machine.disk(Needs(disk=110 << 20), tmp_path, 2).passed is False
    assert machine.disk(Needs(disk=1, checkpoint=101 << 20), tmp_path, 2).passed is False


def test_too_few_inodes_fail_whatever_the_bytes(tmp_path, monkeypatch):
    of_disk(monkeypatch, 1 << 50, inodes=2999)
    assert machine.disk(Needs(disk=1), tmp_path, 256).passed is False
    assert "2,999 inodes left, wanted are 3,024" in machine.disk(Needs(disk=1), tmp_path, 256).detail


def test_little_shared_memory_fails(tmp_path):
    assert machine.shared_memory(Settings(shared_memory_gb=1e9), tmp_path).passed is False
    assert machine.shared_memory(Settings(shared_memory_gb=0), tmp_path / "absent").passed is False


def test_locked_memory_does_not_matter_on_cpu():
    assert machine.locked_memory("cpu").passed is None


# ------------------------------------------------------------------------------------------------------------ GPUs

ROW = "{0}, GPU-{0}, NVIDIA H100 80GB HBM3, 580.65, 81559, 4, {1}, No, No"


def fake_nvidia_smi(folder: Path, monkeypatch, rows: list[str], processes: str = "", code: int = 0) -> None:
    program = folder / "nvidia-smi"
    listed = "\n".join(rows)
    program.write_text(
        f"#!/bin/bash\ncase $1 in *query-gpu*) echo '{listed}' ;; *) echo -n '{processes}' ;; esac\nexit {code}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def look(wanted: int = 2, needs: Needs = Needs(), visible: str | None = None):  # noqa: B008  frozen
    return gpu_state.gpus("cuda", wanted, needs, visible)


def test_healthy_gpus_pass_and_tell_model_and_driver(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, [ROW.format(i, 0) for i in range(2)])
    finding, same = look()
    assert finding.passed is True
    assert same == {"GPU model": "NVIDIA H100 80GB HBM3", "driver": "580.65"}


@pytest.mark.parametrize(
    ("rows", "needs", "words"),
    [
        ([ROW.format(0, 0)], Needs(), "1 GPUs, 2 are wanted"),
        ([ROW.format(0, 0), ROW.format(1, 3)], Needs(), "GPU 1: 3 uncorrected ECC errors"),
        ([ROW.format(0, 0), ROW.format(1, 0).replace("No, No", "Yes, No")], Needs(), "wait to be remapped"),
        ([ROW.format(0, 0), ROW.format(1, 0).replace(", 4, ", ", 40000, ")], Needs(), "40000 MiB are in use"),
        ([ROW.format(0, 0), ROW.format(1, 0)], Needs(rank=90 * GB), "the plan needs"),
    ],
)
def test_bad_gpu_is_told(tmp_path, monkeypatch, rows, needs, words):
    fake_nvidia_smi(tmp_path, monkeypatch, rows)
    finding, _ = look(needs=needs)
    assert finding.passed is False
    assert words in finding.detail


def test_gpu_that_does_not_count_ecc_errors_is_no_problem(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, [ROW.format(i, "[N/A]") for i in range(2)])
    assert look()[0].passed is True


def test_foreign_process_is_told_but_only_on_the_job_s_own_gpus(tmp_path, monkeypatch):
    rows = [ROW.format(i, 0) for i in range(4)]
    fake_nvidia_smi(tmp_path, monkeypatch, rows, "GPU-3, 4711, python")
    assert "process 4711 (python)" in look(4)[0].detail
    assert look(2, visible="0,1")[0].passed is True


def test_broken_driver_is_told(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, ["Failed to initialize NVML: Driver/library version mismatch"], code=18)
    assert "nvidia-smi ended with 18: Failed to initialize NVML" in look()[0].detail


def test_node_without_nvidia_smi_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not installed" in look()[0].detail


def test_inactive_infiniband_port_shows_in_the_number_that_is_compared(tmp_path):
    for number, state in ((0, "4: ACTIVE"), (1, "1: DOWN")):
        file = tmp_path / f"mlx5_{number}" / "ports" / "1" / "state"
        file.parent.mkdir(parents=True)
        file.write_text(state + "\n")
    finding, same = gpu_state.infiniband(tmp_path)
    assert same == {"active ports": 1}
    assert "not mlx5_1/1" in finding.detail


# -------------------------------------------------------------------------------------------------------- software


def interpreter(folder: Path, script: str) -> str:
    """A stand-in for the environment's interpreter."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib/python3.11/site-packages").mkdir(parents=True)
    python = folder / "bin/python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {folder}/tried\n{script}\n')
    python.chmod(0o755)
    return str(python)


def test_what_training_cannot_import_is_named(tmp_path):
    script = "echo 'Traceback' >&2; echo \"ModuleNotFoundError: No module named 'xtuner'\" >&2; exit 1"
    python = interpreter(tmp_path, script)
    for _ in range(2):
        error = software.import_error(["flash_attn"], python, tmp_path / "memory")
        assert error == "training cannot be imported: ModuleNotFoundError: No module named 'xtuner'"
    assert (tmp_path / "tried").read_text() == 2 * "-m deepseek_sft.training.xtuner_engine.imports cuda flash_attn\n"
    assert "cannot be started" in software.import_error([], str(tmp_path / "no/python"), tmp_path / "memory")


def test_an_environment_that_was_imported_on_a_node_is_tried_again_once_it_changes(tmp_path):
    python, tried = interpreter(tmp_path, "exit 0"), tmp_path / "tried"
    for _ in range(2):
        assert software.import_error([], python, tmp_path / "memory") == ""
    assert len(tried.read_text().splitlines()) == 1
    (tmp_path / "lib/python3.11/site-packages/new").touch()
    assert software.import_error([], python, tmp_path / "memory") == ""
    assert len(tried.read_text().splitlines()) == 2


def test_changed_file_changes_the_hash_of_code_and_folder(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "shard").write_bytes(bytes(software.SMALL + 10))
    before = software.code(tmp_path), software.folder(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert software.code(tmp_path) != before[0]
    (tmp_path / "a.py").write_text("x = 1\n")
    assert (software.code(tmp_path), software.folder(tmp_path)) == before
    (tmp_path / "shard").write_bytes(bytes(software.SMALL + 9) + b"x")  # the same size, another end
    assert software.folder(tmp_path) != before[1]
    assert software.folder(tmp_path / "absent") == "missing"


def test_packages_are_named_with_their_versions():
    found = software.packages()
    assert found["snakemake"] == "9.27.1"
    assert "Python" in found


# --------------------------------------------------------------------------------------------------------- network


@pytest.fixture
def service():
    opened = Service(0, "here", "attempt-1")
    yield opened, opened.server_address[1]
    opened.shutdown()
    opened.server_close()


def test_service_tells_who_and_when(service):
    answer = exchange.ask("127.0.0.1", service[1], {"ask": "hello"})
    assert (answer["host"], answer["attempt"]) == ("here", "attempt-1")
    offset, uncertain = network.clock_offset("127.0.0.1", service[1])
    assert abs(offset) <= uncertain + 0.05


def test_reports_and_decisions_pass_through_the_first_node(service):
    opened, port = service
    request = {"phase": 1, "rank": 3, "attempt": "attempt-1"}
    assert exchange.ask("127.0.0.1", port, {"ask": "decision"} | request) == {"decision": None}
    exchange.ask("127.0.0.1", port, {"ask": "report", "report": {"host": "d"}} | request)
    assert opened.board.reports(1) == {3: {"host": "d"}}
    opened.board.decide(1, {"load": 7})
    assert exchange.ask("127.0.0.1", port, {"ask": "decision"} | request) == {"decision": {"load": 7}}
    assert opened.board.fetched(1) == {3}


def test_report_of_another_attempt_is_not_taken(service):
    opened, port = service
    exchange.ask("127.0.0.1", port, {"ask": "report", "phase": 1, "rank": 0, "attempt": "other", "report": {}})
    assert opened.board.reports(1) == {}


def test_data_comes_back_as_size_and_checksum(service):
    payload = os.urandom(3_000_001)
    answer = exchange.ask("127.0.0.1", service[1], {"ask": "data", "bytes": len(payload)}, payload)
    assert answer == {"bytes": len(payload), "crc32": zlib.crc32(payload)}


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"{}\n", b'{"ask": "data", "bytes": "x"}\n'])
def test_stranger_gets_no_answer_and_does_no_harm(service, line):
    with socket.create_connection(("127.0.0.1", service[1]), timeout=5) as link:
        link.sendall(line)
        with contextlib.suppress(OSError):  # the service resets instead of closing
            link.shutdown(socket.SHUT_WR)
            assert link.recv(100) == b""
    assert exchange.ask("127.0.0.1", service[1], {"ask": "hello"})["host"] == "here"


def test_taken_port_is_refused(service):
    with pytest.raises(OSError, match="in use"):
        Service(service[1], "again", "attempt-1")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this kernel has no IPv6")
def test_a_node_that_has_addresses_of_ipv6_alone_is_reached(service):
    assert exchange.ask("::1", service[1], {"ask": "hello"})["host"] == "here"
    assert exchange.ask("127.0.0.1", service[1], {"ask": "hello"})["host"] == "here"


def test_every_node_is_called_by_several_others_and_few_call_all():
    for nodes in (1, 2, 5, 8):
        assert network.partners(nodes, 0) == list(range(1, nodes))
    called = [rank for caller in range(512) for rank in network.partners(512, caller)]
    assert len(called) < 512 * 20
    assert min(called.count(rank) for rank in range(512)) >= 17
    assert all(0 in network.partners(512, rank) for rank in range(1, 512))


def test_node_of_another_job_on_the_port_is_told(service, tmp_path):
    found = network.reach(["me", "127.0.0.1"], 0, service[1], "attempt-2", Folder(tmp_path), 0.1)
    assert found == {"127.0.0.1": "it answers for attempt-1"}


def test_port_can_be_listened_on_again_at_once():
    first = Service(0, "here", "attempt-1")
    port = first.server_address[1]
    exchange.ask("127.0.0.1", port, {"ask": "hello"})
    first.shutdown()
    first.server_close()
    # Its thread for our connection may take a moment to close; a socket in TIME_WAIT would hold the port for a minute.
    deadline = time.monotonic() + 20
    while True:
        with socket.socket() as listener:  # without SO_REUSEADDR, as the strictest program would
            try:
                listener.bind(("", port))
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
        time.sleep(0.05)


def test_file_that_another_node_wrote_differently_is_told(tmp_path):
    (tmp_path / "probe-1").write_bytes(network.content("attempt-1", 7))
    finding, facts = network.shared_files(tmp_path, "attempt-1", ["a", "b"], 0, 1)
    assert finding.passed is False
    assert "the file of b reads differently" in finding.detail
    assert facts == {"wrote": True, "reads": "b"}


def test_file_that_never_appears_is_told(tmp_path):
    finding, _ = network.shared_files(tmp_path, "attempt-1", ["a", "b"], 0, 0.1)
    assert "the file of b has not shown up" in finding.detail


# -------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"skip": ["gpu"]}, "skip.0: .gpu. is not allowed, expected one of host_memory"),
        (
            {"all_reduce_backend": "mpi"},
            "all_reduce_backend: .mpi. is not allowed, expected one of auto, nccl, gloo",
        ),
        ({"clock_skew": 1}, "clock_skew: unknown key; did you mean `clock_skew_s`"),
        ({"timeout_s": -1}, "timeout_s: -1 is not allowed, expected a number above 0"),
        ([], "it is a list, not an object"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, values, words):
    file = tmp_path / "s.json"
    file.write_text(json.dumps(values))
    with pytest.raises(BadInputError, match=words):
        settings.read(file)


def test_backend_follows_from_accelerator_and_nodes():
    assert Settings().backend("cuda", 32) == "nccl"
    assert Settings().backend("cpu", 4) == "gloo"
    assert Settings().backend("cpu", 5) == "sockets"
    assert Settings(all_reduce_backend="gloo").backend("cuda", 32) == "gloo"


MOUNTS = "/dev/sda / ext4 rw 0 0\nserver:/x /scratch lustre rw 0 0\n/dev/nvme0n1 /scratch/own\\040disk xfs rw 0 0\n"


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/var/x", "ext4"), ("/scratch/a", "lustre"), ("/scratch/own disk/a", "xfs"), ("/scratched", "ext4")],
)
def test_the_file_system_of_a_folder_is_that_of_its_nearest_mount(tmp_path, folder, kind):
    (tmp_path / "mounts").write_text(MOUNTS)
    assert own_disk.file_system(Path(folder), tmp_path / "mounts") == kind


def on_own_disk(folder: Path, rank: int = 0) -> own_disk.OwnDisk:
    found = own_disk.OwnDisk(str(folder), "try", rank)
    found.sign()
    return found


def test_a_folder_of_a_network_file_system_is_no_disk_of_the_nodes_own(tmp_path):
    (tmp_path / "mounts").write_text(f"server:/x {tmp_path} nfs4 rw 0 0\n")
    found = on_own_disk(tmp_path).judge(Needs(), tmp_path, True, tmp_path / "mounts")
    assert found.passed is False and "lies on nfs4, which other nodes see" in found.detail


def test_a_folder_inside_a_container_is_no_disk_of_the_nodes_own(tmp_path):
    (tmp_path / "mounts").write_text("overlay / overlay rw 0 0\n")
    found = on_own_disk(tmp_path).judge(Needs(), tmp_path, True, tmp_path / "mounts")
    assert found.passed is False and "lies in a container, and ends with it" in found.detail


def test_a_folder_in_which_another_nodes_file_shows_up_is_no_disk_of_the_nodes_own(tmp_path):
    first = on_own_disk(tmp_path / "local")
    on_own_disk(tmp_path / "local", rank=3)
    found = first.judge(Needs(), tmp_path, True)
    assert found.passed is False and "node 3's file is there" in found.detail


def test_a_disk_that_is_too_small_for_the_planned_checkpoints_fails_and_what_lies_there_counts(tmp_path):
    there = tmp_path / "local" / "run-12345678" / "step_1"
    there.mkdir(parents=True)
    (there / "file").write_bytes(bytes(8 << 20))
    found = on_own_disk(tmp_path / "local")
    free = shutil.disk_usage(tmp_path).free
    assert found.judge(Needs(own_disk=free + (4 << 20)), tmp_path, True).passed is False
    (tmp_path / "train" / "runs" / "run").mkdir(parents=True)
    judged = found.judge(Needs(own_disk=free // 2 + (4 << 20)), tmp_path, True)
    assert (
        judged.passed is True and "no other node wrote there" in judged.detail and "8.00 MiB are there" in judged.detail
    )
    found.forget()
    assert not list((tmp_path / "local").glob(".preflight*"))


def test_a_folder_that_cannot_be_written_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").touch()
    found = on_own_disk(tmp_path / "file" / "sft").judge(Needs(), tmp_path, True)
    assert found.passed is False and "cannot be written: Not a directory" in found.detail
    found = on_own_disk(Path("$NO_SUCH_VARIABLE/x")).judge(Needs(), tmp_path, True)
    assert found.passed is False and "NO_SUCH_VARIABLE is not set on this node" in found.detail
