"""A swap file exists only while it is needed, is found again after a crash, and nothing else is ever touched.

The system's tools are replaced by ones that write down how they were called: no swap is really switched on here
(``make test-swap`` does that).
"""

import json
import socket

import pytest

from deepseek_sft.errors import BadInputError
from deepseek_sft.tensors import memory_bound, swap
from deepseek_sft.tensors.memory_bound import Memory

GIB = 1 << 30
EXISTING = "/dev/sda2 partition 8388604 0 -2"
PLENTY = Memory(available=4 * GIB, swap_free=0, group_limit=None, group_free=None)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A /proc with one swap partition, and tools that keep its list of swaps; everything called is recorded."""
    proc, calls = tmp_path / "proc", []
    (proc / "sys/kernel/random").mkdir(parents=True)
    (proc / "sys/kernel/random/boot_id").write_text("boot-1\n")
    (proc / "self").mkdir()
    (proc / "self/mounts").write_text(f"/dev/sda1 / ext4 rw 0 0\ntmpfs {tmp_path}/memory tmpfs rw 0 0\n")
    swaps = [EXISTING]

    def show():
        (proc / "swaps").write_text("Filename Type Size Used Priority\n" + "".join(f"{line}\n" for line in swaps))

    def tool(name, *arguments):
        calls.append((name, *arguments))
        if name == "swapon":
            swaps.append(f"{arguments[0]} file 1 0 -3")
        if name == "swapoff":
            swaps[:] = [line for line in swaps if line.split()[0] != arguments[0]]
        show()

    show()
    monkeypatch.setattr(swap, "PROC", proc)
    monkeypatch.setattr(swap, "_tool", tool)
    monkeypatch.setattr(swap, "RESERVE", 4096)
    monkeypatch.setattr(swap.os, "geteuid", lambda: 0)
    monkeypatch.setattr(swap, "_started", lambda pid: 77 if pid == swap.os.getpid() else None)
    machine.calls, machine.swaps, machine.proc = calls, swaps, proc
    return machine


def records(folder):
    return sorted(p.name for p in folder.iterdir() if ".swap" in p.name)


def test_swap_file_lives_as_long_as_the_run(tmp_path, machine):
    with swap.provided(100_000, tmp_path / "model", tmp_path, PLENTY):
        (file,) = tmp_path.glob("deepseek-sft-*.swap")
        assert file.stat().st_size >= 100_000 and file.stat().st_size % 4096 == 0
        assert file.stat().st_mode & 0o777 == 0o600
        assert machine.swaps == [EXISTING, f"{file} file 1 0 -3"]
    assert [call[0] for call in machine.calls] == ["mkswap", "swapon", "swapoff"]
    assert {call[1] for call in machine.calls} == {str(file)}
    assert machine.swaps == [EXISTING] and records(tmp_path) == []


def test_swap_file_is_removed_when_the_run_fails(tmp_path, machine):
    with pytest.raises(RuntimeError), swap.provided(1000, tmp_path / "model", tmp_path, PLENTY):
        raise RuntimeError
    assert machine.swaps == [EXISTING] and records(tmp_path) == []


@pytest.mark.parametrize("failing", ["mkswap", "swapon"])
def test_nothing_remains_when_a_tool_fails(tmp_path, machine, monkeypatch, failing):
    real = swap._tool

    def tool(name, *arguments):
        if name == failing:
            raise BadInputError(f"{name} failed")
        real(name, *arguments)

    monkeypatch.setattr(swap, "_tool", tool)
    with pytest.raises(BadInputError, match=failing), swap.provided(1000, tmp_path / "model", tmp_path, PLENTY):
        pytest.fail("without swap nothing may run")
    assert machine.swaps == [EXISTING] and records(tmp_path) == []


def test_swap_file_of_another_run_with_the_same_name_is_left_alone(tmp_path, machine):
    others = tmp_path / f"deepseek-sft-{socket.gethostname()}-{swap.os.getpid()}.swap"
    others.write_bytes(b"pages")
    machine.swaps.append(f"{others} file 1 0 -3")
    (machine.proc / "swaps").write_text("Filename\n" + "".join(f"{line}\n" for line in machine.swaps))
    with (
        pytest.raises(BadInputError, match=r"cannot be made: File exists[\s\S]*--swap-folder"),
        swap.provided(1000, tmp_path / "model", tmp_path, PLENTY),
    ):
        pytest.fail("without swap nothing may run")
    assert machine.calls == [] and others.read_bytes() == b"pages" and records(tmp_path) == [others.name]


def test_no_file_is_made_where_none_is_needed(tmp_path, machine):
    with swap.provided(0, tmp_path / "model", tmp_path, PLENTY):
        pass
    enough = Memory(GIB, swap_free=2 * GIB, group_limit=None, group_free=None)
    with swap.provided(GIB, tmp_path / "model", tmp_path, enough):
        pass
    assert machine.calls == []


def leave_behind(tmp_path, machine, **changes):
    """What a killed run leaves: its record, its file, and the file switched on."""
    file = tmp_path / "deepseek-sft-old-5.swap"
    file.write_bytes(b"x")
    fields = {"path": str(file), "host": socket.gethostname(), "boot": "boot-1", "pid": 5, "started": 3} | changes
    (tmp_path / "model.swap-old-5.json").write_text(json.dumps(fields))
    machine.swaps.append(f"{file} file 1 0 -3")
    (machine.proc / "swaps").write_text("Filename\n" + "".join(f"{line}\n" for line in machine.swaps))
    return file


def test_swap_file_of_a_crashed_run_is_removed_by_the_next(tmp_path, machine):
    file = leave_behind(tmp_path, machine)
    swap.remove_stale(tmp_path / "model")
    assert machine.calls == [("swapoff", str(file))]
    assert machine.swaps == [EXISTING] and records(tmp_path) == []


def test_swap_file_from_before_a_reboot_is_only_deleted(tmp_path, machine):
    leave_behind(tmp_path, machine, boot="boot-0")
    machine.swaps[:] = [EXISTING]
    (machine.proc / "swaps").write_text(f"Filename\n{EXISTING}\n")
    swap.remove_stale(tmp_path / "model")
    assert machine.calls == [] and records(tmp_path) == []


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"pid": swap.os.getpid(), "started": 77}])
def test_swap_file_of_another_host_or_of_a_living_process_is_left_alone(tmp_path, machine, changes):
    leave_behind(tmp_path, machine, **changes)
    swap.remove_stale(tmp_path / "model")
    assert machine.calls == [] and len(records(tmp_path)) == 2


def test_reused_process_id_does_not_protect_a_stale_file(tmp_path, machine):
    leave_behind(tmp_path, machine, pid=swap.os.getpid(), started=76)
    swap.remove_stale(tmp_path / "model")
    assert records(tmp_path) == []


def test_record_that_cannot_be_read_is_said_and_kept(tmp_path, machine, capsys):
    (tmp_path / "model.swap-h-1.json").write_text("{")
    swap.remove_stale(tmp_path / "model")
    assert "swapon --show" in capsys.readouterr().err and records(tmp_path) == ["model.swap-h-1.json"]


def test_reasons_why_no_swap_can_be_had_are_told(tmp_path, machine, monkeypatch):
    def refused(match, folder=tmp_path, needed=10_000, found=PLENTY):
        with pytest.raises(BadInputError, match=match), swap.provided(needed, tmp_path / "model", folder, found):
            pytest.fail("without swap nothing may run")
        assert machine.calls == [] and records(tmp_path) == []

    (tmp_path / "memory").mkdir()
    refused("on tmpfs, where no swap file can be", folder=tmp_path / "memory")
    refused("does not exist", folder=tmp_path / "absent")
    refused("free, the swap file needs", needed=1 << 60)
    refused("the control group allows 1.00 KiB", found=Memory(GIB, 0, GIB, GIB, group_swap=1024))
    monkeypatch.setattr(swap.os, "geteuid", lambda: 1000)
    refused("must be root")


def test_bound_above_free_memory_needs_permission_for_swap():
    with pytest.raises(BadInputError, match="or --swap auto"):
        memory_bound.plan_buffers("64GiB", 4, 8, PLENTY, largest=1 << 30)
    buffers = memory_bound.plan_buffers("64GiB", 4, 8, PLENTY, largest=1 << 30, swap=True)
    assert buffers.chunk == 1 << 30  # whole tensors
    assert buffers.beyond == buffers.size - PLENTY.usable
    modest = memory_bound.plan_buffers("64GiB", 4, 8, PLENTY, largest=1 << 20, swap=True)
    assert modest.beyond == 0  # no tensor needs that much


@pytest.mark.parametrize("version", [1, 2])
def test_swap_that_the_control_group_leaves_is_measured(tmp_path, version):
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    folder = root / "job" if version == 2 else root / "memory/job"
    (proc / "self").mkdir(parents=True)
    folder.mkdir(parents=True)
    (proc / "meminfo").write_text("MemAvailable: 50 kB\nSwapFree: 7 kB\n")
    (proc / "self/cgroup").write_text("0::/job\n" if version == 2 else "5:memory:/job\n")
    figures = {"memory.max": 1000, "memory.current": 600, "memory.swap.max": 500, "memory.swap.current": 100}
    if version == 1:
        figures = {"limit_in_bytes": 1000, "usage_in_bytes": 600}
        figures |= {"memsw.limit_in_bytes": 1500, "memsw.usage_in_bytes": 700}
        figures = {f"memory.{name}": value for name, value in figures.items()}
    for name, value in figures.items():
        (folder / name).write_text(f"{value}\n")
    found = memory_bound.measure(proc, root)
    assert (found.group_swap, found.usable_swap) == (400, 400)
    assert "the group may use 400 B" in str(found)
