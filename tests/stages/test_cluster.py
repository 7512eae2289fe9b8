"""The emulated cluster keeps what cluster/README.md promises."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cluster_fixture
import pytest
from cluster_fixture import Cluster

cluster = cluster_fixture.cluster
pytestmark = pytest.mark.cluster

NAMESPACES = ("pid", "net", "uts", "mnt", "ipc")


def wait_for(wanted: str, look: Callable[[], str], seconds: float = 60) -> None:
    """Fail unless what ``look`` returns begins like ``wanted`` one day; the bound only ends a test that would hang."""
    deadline = time.monotonic() + seconds
    while not (seen := look()).startswith(wanted):
        assert time.monotonic() < deadline, f"{seen} has not become {wanted}"
        time.sleep(0.2)


def processes_of(folder: Path) -> list[str]:
    """Living processes with the folder in their command line or environment."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                text = (process / "cmdline").read_bytes() + b"\0" + (process / "environ").read_bytes()
            except OSError:
                continue
            if os.fsencode(folder) in text:
                found.append(f"{process.name}: {text[:200]!r}")
    return found


def traces_of(cluster: Cluster) -> list[str]:
    """What a cluster leaves on the host: processes, mounts, network interfaces, files."""
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(cluster.state) in line]
    names = {"switch", "login", *(f"node{i + 1}" for i in range(cluster.nodes))}
    links = [link.name for link in Path("/sys/class/net").iterdir() if link.name in names]
    files = [str(cluster.state)] if cluster.state.exists() else []
    return processes_of(cluster.state) + mounts + links + files


def of_each_node(cluster: Cluster, command: str) -> list[str]:
    """Output of a shell command that one task per node runs, one line each."""
    return cluster.exec("srun", f"--nodes={cluster.nodes}", "bash", "-c", command).stdout.split("\n")[:-1]


# ----------------------------------------------------------------------------------------------------- nodes


def test_tasks_on_different_nodes_see_different_host_names(cluster: Cluster) -> None:
    assert sorted(of_each_node(cluster, "hostname")) == ["node1", "node2", "node3"]


def test_every_node_has_a_first_process_and_namespaces_of_its_own(cluster: Cluster) -> None:
    files = " ".join(f"/proc/1/ns/{name}" for name in NAMESPACES)
    seen = [line.split() for line in of_each_node(cluster, f"echo $(readlink {files})")]
    seen.append(cluster.exec("readlink", *files.split()).stdout.split())
    seen.append([str(Path(f"/proc/self/ns/{name}").readlink()) for name in NAMESPACES])
    for of_one_kind in zip(*seen, strict=True):
        assert len(set(of_one_kind)) == cluster.nodes + 2


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
def test_temporary_files_are_seen_by_their_own_node_only(cluster: Cluster, folder: str) -> None:
    file = f"{folder}/mark-{os.getpid()}"
    cluster.node("node1", "touch", file)
    assert cluster.node("node1", "test", "-e", file, check=False).returncode == 0
    assert cluster.node("node2", "test", "-e", file, check=False).returncode == 1
    assert cluster.exec("test", "-e", file, check=False).returncode == 1
    assert not Path(file).exists()


def test_project_and_shared_folders_have_the_same_path_on_all_nodes(cluster: Cluster, project: Path) -> None:
    (cluster.folder / "shared").write_text("yes")
    command = f"cat {cluster.folder}/shared && test -e {project}/cluster/vcluster && echo"
    assert of_each_node(cluster, command) == ["yes"] * cluster.nodes
    cluster.node("node2", "bash", "-c", f"echo node2 > {cluster.folder}/answer")
    assert (cluster.folder / "answer").read_text() == "node2\n"


def test_environments_in_a_cache_below_tmp_are_shared(tmp_path: Path) -> None:
    cache, hidden = tmp_path / "cache", tmp_path / "hidden"
    for folder in (cache, hidden, tmp_path / "shared"):
        folder.mkdir()
    with Cluster(tmp_path / "shared", 1, {"ENVS_CACHE": str(cache)}) as other:
        assert other.node("node1", "test", "-d", str(cache), check=False).returncode == 0
        assert other.node("node1", "test", "-d", str(hidden), check=False).returncode == 1


def test_two_nodes_use_the_same_port_and_find_each_other_by_name(cluster: Cluster) -> None:
    code = (
        "import socket, time\n"
        "server = socket.create_server(('', 29500))\n"  # taken already by the other task, were it one host
        "peer = 'node2' if socket.gethostname() == 'node1' else 'node1'\n"
        "while (link := socket.socket()).connect_ex((peer, 29500)): time.sleep(0.1)\n"
        "print(link.getpeername()[0])\n"
        "server.accept()\n"
    )
    done = cluster.exec("srun", "--nodes=2", "--nodelist=node1,node2", "python3", "-c", code)
    assert sorted(done.stdout.split()) == ["10.77.0.101", "10.77.0.102"]


# ----------------------------------------------------------------------------------------------------- Slurm


@pytest.mark.parametrize("partition", ["cpu", "train", "serve"])
def test_partition_takes_jobs(cluster: Cluster, partition: str) -> None:
    assert cluster.exec("srun", "--partition", partition, "echo", "ran").stdout == "ran\n"


def test_requested_gpus_show_up_in_the_task(cluster: Cluster) -> None:
    done = cluster.exec("srun", "--gres=gpu:h100:8", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES $SLURM_GPUS_ON_NODE")
    assert done.stdout.split() == ["0,1,2,3,4,5,6,7", "8"]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ("--nodes=4", "Node count specification invalid"),
        ("--gres=gpu:9", "Requested node configuration is not available"),
        ("--mem=300000", "Memory specification can not be satisfied"),
        ("--partition=nope", "invalid partition"),
    ],
)
def test_request_that_cannot_be_met_is_refused_at_once(cluster: Cluster, request_: str, words: str) -> None:
    done = cluster.exec("sbatch", request_, "--wrap", "true", check=False)
    assert done.returncode != 0
    assert words in done.stderr


def test_step_over_its_memory_is_killed(cluster: Cluster) -> None:
    code = "import time; data = bytearray(300 << 20); time.sleep(60); print('survived')"
    done = cluster.exec("srun", "--mem=100", "python3", "-c", code, check=False)
    assert done.returncode != 0
    assert "exceeded memory limit" in done.stderr
    assert "survived" not in done.stdout


def test_tasks_are_not_deaf_to_interrupts(cluster: Cluster) -> None:
    ignored = [int(line.split()[1], 16) for line in of_each_node(cluster, "grep SigIgn /proc/self/status")]
    assert [mask & (1 << (signal.SIGINT - 1)) for mask in ignored] == [0] * cluster.nodes


def test_node_without_power_is_down_fails_its_job_and_comes_back(cluster: Cluster) -> None:
    job = cluster.submit("--nodelist=node3")
    wait_for("RUNNING", lambda: cluster.job_state(job))
    cluster.kill_node("node3")
    assert "has no power" in cluster.node("node3", "true", check=False).stderr
    assert "node3 has no power" in cluster.run("status").stdout
    wait_for("NODE_FAIL", lambda: cluster.job_state(job))
    wait_for("down", lambda: cluster.node_state("node3"))
    cluster.start_node("node3")
    assert cluster.exec("srun", "--nodelist=node3", "hostname").stdout == "node3\n"


# ------------------------------------------------------------------------------------------------------ exec


def test_exec_keeps_folder_environment_input_and_exit_code(cluster: Cluster) -> None:
    cluster.environment["COLOUR"] = "a blue  one"
    script = 'hostname; pwd; echo "$COLOUR"; cat; exit 7'
    done = cluster.exec("bash", "-c", script, input="given\n", check=False)
    assert done.stdout.splitlines() == ["login", str(cluster.folder), "a blue  one", "given"]
    assert done.returncode == 7


def test_exec_reports_a_missing_command_and_a_signal_as_shells_do(cluster: Cluster) -> None:
    assert cluster.exec("no-such-command", check=False).returncode == 127
    assert cluster.exec("bash", "-c", "kill -TERM $$", check=False).returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("to", ["process", "group"])  # as from kill, and as from a terminal
def test_interrupt_reaches_the_command_once_and_exec_waits_for_it(cluster: Cluster, to: str) -> None:
    code = (
        "import signal, sys, time\n"
        "count = []\n"
        "signal.signal(signal.SIGINT, lambda *_: count.append(1))\n"
        "print('ready', flush=True)\n"
        "while not count: time.sleep(0.01)\n"
        "time.sleep(0.5)\n"
        "print('cleaned up after', len(count), flush=True)\n"
        "sys.exit(3)\n"
    )
    process = subprocess.Popen(
        cluster.command("exec", "python3", "-c", code),
        env=cluster.environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    (os.kill if to == "process" else os.killpg)(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "cleaned up after 1\n"
    assert process.returncode == 3


# ------------------------------------------------------------------------------------------------ up and down


def test_up_when_it_is_up_says_so_and_refuses_another_shape(cluster: Cluster) -> None:
    assert "already up" in cluster.up().stderr
    assert "already up" in cluster.run("up").stderr
    for options in (["--nodes", "2"], ["--flat"]):
        done = cluster.run("up", *options, check=False)
        assert done.returncode == 2
        assert "already running" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["up", "--nodes", "0"], ["up", "--share", "/nope"], ["node", "node9", "true"], ["exec"], ["nonsense"]]
)
def test_wrong_use_is_one_message_and_exit_code_2(cluster: Cluster, arguments: list[str]) -> None:
    done = cluster.run(*arguments, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def test_commands_without_a_cluster_say_how_to_start_one(tmp_path: Path) -> None:
    nothing = Cluster(tmp_path, 1)
    done = nothing.exec("true", check=False)
    assert done.returncode == 2
    assert "vcluster up" in done.stderr
    assert nothing.run("status", check=False).returncode == 1
    assert "no cluster was running" in nothing.down().stderr


def test_down_leaves_nothing_behind_with_jobs_running_and_a_node_dead(tmp_path: Path) -> None:
    with Cluster(tmp_path, 2) as other:
        other.submit("--nodes=2", wrap="srun sleep 1000")
        wait_for("RUNNING", lambda: other.exec("squeue", "--noheader", "--format=%T").stdout)
        other.kill_node("node2")
        assert processes_of(other.state), "the search for processes finds nothing at all"
        inside = subprocess.Popen(other.command("exec", "sleep", "1000"), env=other.environment)
        time.sleep(0.5)
    assert inside.wait(timeout=10) != 0
    assert traces_of(other) == []
    assert list(tmp_path.iterdir()) == []


def test_two_clusters_run_side_by_side(cluster: Cluster, tmp_path: Path) -> None:
    with Cluster(tmp_path, 1) as other:
        job = other.submit()
        wait_for("RUNNING", lambda: other.job_state(job))
        assert job not in cluster.exec("squeue", "--noheader", "--format=%i").stdout.split()
        assert cluster.exec("srun", "--nodes=3", "hostname").stdout.count("node") == 3
    assert cluster.exec("srun", "hostname").stdout.startswith("node")


def test_what_a_killed_cluster_left_is_cleaned_even_if_its_pid_lives_again(tmp_path: Path) -> None:
    with Cluster(tmp_path, 1) as other:
        box = other.state / "state" / "run" / "box"
        pid, rest = box.read_text().split(maxsplit=1)
        os.kill(int(pid), signal.SIGKILL)
        wait_for("no cluster", lambda: other.run("status", check=False).stderr)
        with subprocess.Popen(["sleep", "1000"]) as bystander:
            box.write_text(f"{bystander.pid} {rest}")
            assert other.run("status", check=False).returncode == 1
            assert "dead cluster" in other.up().stderr
            assert bystander.poll() is None
            bystander.kill()
        assert other.exec("srun", "hostname").stdout == "node1\n"


def test_cluster_seen_from_inside_itself_is_left_alone(cluster: Cluster) -> None:
    for command in ("up", "down", "status"):
        done = cluster.exec(*cluster.command(command), check=False)
        assert done.returncode == 2
        assert "was started on" in done.stderr
    assert cluster.exec("hostname").stdout == "login\n"


def test_folder_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    other = Cluster(tmp_path, 1)
    file = other.state / "state" / "precious"
    file.parent.mkdir(parents=True)
    file.touch()
    for done in (other.up(check=False), other.down(check=False)):
        assert done.returncode == 2
    assert file.exists()


# ---------------------------------------------------------------------------------------------- other machines


def test_missing_daemon_is_named_with_the_package_to_install(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not Path("/usr/sbin/slurmctld").exists():
        pytest.skip("only root can hide programs, and only in a folder without others that are needed")
    (tmp_path / "empty").mkdir()
    script = f'mount --bind {tmp_path}/empty /usr/sbin && exec "$0" "$@"'
    done = Cluster(tmp_path, 1, prefix=["unshare", "--mount", "sh", "-c", script]).up(check=False)
    assert done.returncode == 2
    assert "apt-get install slurm-wlm munge" in done.stderr


@pytest.fixture
def ordinary_user() -> Iterator[tuple[Path, list[str]]]:
    """A folder of an ordinary user, and a command prefix that becomes this user."""
    if os.geteuid() != 0:
        pytest.skip("all tests here run as an ordinary user already")
    user = pwd.getpwnam("nobody")
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are root's alone
    os.chown(folder, user.pw_uid, user.pw_gid)
    become = f"setpriv --reuid={user.pw_uid} --regid={user.pw_gid} --clear-groups env PATH=/usr/bin:/bin HOME={folder}"
    yield folder, become.split()
    shutil.rmtree(folder)


def test_ordinary_user_gets_the_same_cluster(ordinary_user: tuple[Path, list[str]], project: Path) -> None:
    folder, become = ordinary_user
    if subprocess.run([*become, "test", "-x", str(project / "cluster" / "vcluster")]).returncode != 0:
        pytest.skip("other users cannot read this checkout")
    with Cluster(folder, 2, prefix=become) as other:
        assert sorted(of_each_node(other, "echo $(hostname) $(id -un)")) == ["node1 nobody", "node2 nobody"]
        assert of_each_node(other, "grep CapEff /proc/self/status")[0].split() == ["CapEff:", "0" * 16]
        assert other.node("node2", "hostname").stdout == "node2\n"
        other.kill_node("node2")
        other.start_node("node2")
        assert other.exec("srun", "--nodelist=node2", "hostname").stdout == "node2\n"
    assert traces_of(other) == []


def test_without_namespaces_the_nodes_share_this_host(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "unshare").write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2\nexit 1\n")
    (programs / "unshare").chmod(0o755)
    folder = Path(tempfile.mkdtemp(prefix="flat"))  # sockets want a short path
    other = Cluster(folder, 2, {"PATH": f"{programs}:{os.environ['PATH']}"})
    try:
        assert "namespaces are not allowed here" in other.up().stderr
        assert sorted(of_each_node(other, "echo $SLURMD_NODENAME")) == ["node1", "node2"]
        # Snakemake's jobstep plugin starts commands without SLURM_CONF.
        assert other.exec("env", "--unset=SLURM_CONF", "srun", "--gres=gpu:8", "echo", "ran").stdout == "ran\n"
        job = other.submit("--nodelist=node2")
        wait_for("RUNNING", lambda: other.job_state(job))
        other.kill_node("node2")
        assert not [line for line in processes_of(other.state) if "sleep" in line]
        other.start_node("node2")
        assert other.exec("srun", "--nodelist=node1", "hostname").stdout.strip() == os.uname().nodename.split(".")[0]
    finally:
        other.down()
    assert traces_of(other) == []
    folder.rmdir()
