"""Promises about where a start runs, who owns the run folder, and what is rendered and started."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_helpers import settings

from deepseek_sft import files, secrets_file
from deepseek_sft.cluster_jobs import holders, queue
from deepseek_sft.errors import BadInputError, CrashError
from deepseek_sft.slurm import nodes
from deepseek_sft.training import launch, lock, schedule, stage
from deepseek_sft.training.xtuner_engine import config

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "alpha,beta",
    "SLURM_RESTART_COUNT": "3",
}


def test_without_slurm_it_is_one_node():
    node = nodes.detect("cpu", 2, {})
    assert (node.nodes, node.node_rank, node.world_size, node.main_host) == (1, 0, 2, "127.0.0.1")


def test_slurm_says_which_node_this_is_and_where_ranks_meet():
    node = nodes.detect("cpu", 4, SLURM)
    assert (node.nodes, node.node_rank, node.main_host, node.world_size) == (2, 1, "alpha", 8)
    assert node.main_port == 24711


@pytest.mark.parametrize("job", [1, 4711, 12767, 12768, 5538466, 67108863])
def test_ranks_never_meet_on_a_port_that_an_outgoing_connection_may_hold(job):
    assert 20000 <= nodes.detect("cpu", 4, SLURM | {"SLURM_JOB_ID": str(job)}).main_port < 32768


def test_all_nodes_of_a_start_share_its_name_and_port_and_a_requeue_has_another_name():
    first, second = (nodes.detect("cpu", 1, SLURM | {"SLURM_NODEID": rank}) for rank in "01")
    assert (first.attempt, first.main_port) == (second.attempt, second.main_port)
    assert nodes.detect("cpu", 1, SLURM | {"SLURM_RESTART_COUNT": "4"}).attempt != first.attempt


def test_on_gpus_the_ranks_are_the_visible_devices():
    assert nodes.detect("cuda", None, SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"}).ranks_per_node == 3
    assert nodes.detect("cuda", None, SLURM | {"SLURM_GPUS_ON_NODE": "8"}).ranks_per_node == 8


@pytest.mark.parametrize(
    ("accelerator", "change", "message"),
    [
        ("cpu", {}, "--ranks-per-node"),
        ("cuda", {}, "no GPUs"),
        ("cuda", {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "alpha"}, "names 1"),
        ("cuda", {"SLURM_GPUS_ON_NODE": "8", "SLURM_NNODES": "two"}, "SLURM_NNODES is 'two'"),
        ("cuda", {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, "once per node"),
    ],
)
def test_an_impossible_place_is_refused(accelerator, change, message):
    with pytest.raises(BadInputError, match="(?s)" + message.replace("(", r"\(")):
        nodes.detect(accelerator, None, SLURM | change)


@pytest.mark.parametrize(
    ("changes", "longest", "message"),
    [
        ({"sequence_parallel_size": 8}, 100, "does not divide the base's 4 attention heads"),
        ({"sequence_parallel_size": 4}, 100, "does not divide the 6 ranks of a node"),
        ({}, 4097, "the longest row has 4097 tokens, the base has 4096 positions"),
    ],
)
def test_settings_that_the_base_or_the_node_cannot_take_are_refused_on_gpus_too(changes, longest, message):
    base = {"num_attention_heads": 4, "n_routed_experts": 8, "max_position_embeddings": 4096}
    node = nodes.detect("cuda", None, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"})
    with pytest.raises(BadInputError, match=message):
        stage._check(settings(**changes), base, {"longest": longest}, node)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_shard": 3}, "does not divide the base's 8 routed experts"),
        ({"expert_parallel_size": 4}, "does not divide the 2 shards of a layer"),
        ({"expert_parallel_size": 4, "experts_per_shard": 2}, "does not divide the 6 ranks"),
        ({"expert_parallel_size": 2, "recompute": "without_experts"}, "lies within a node"),
        ({"recompute": "without_experts"}, "lies within a node"),
    ],
)
def test_a_start_by_hand_refuses_how_experts_cannot_be_spread(changes, message):
    node = nodes.detect("cuda", None, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"})
    with pytest.raises(BadInputError, match=message):
        stage._check_experts(settings(**changes), {"n_routed_experts": 8}, node)


def test_an_optimizer_that_nothing_can_compile_is_refused_before_the_start(monkeypatch):
    base = {"num_attention_heads": 4, "n_routed_experts": 8}
    node, chosen = nodes.detect("cuda", 8, SLURM), settings(strategy="zero3_offload", optimizer="cpu_adam")
    monkeypatch.setenv("CXX", "cat")
    stage._check(chosen, base, {"longest": 100}, node)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BadInputError, match=r"node 1 has no C\+\+ compiler \(no-such-compiler\)"):
        stage._check(chosen, base, {"longest": 100}, node)
    stage._check(settings(), base, {"longest": 100}, node)


def test_scontrol_expands_ranges(tmp_path, monkeypatch):
    tool = tmp_path / "scontrol"
    tool.write_text('#!/bin/sh\n[ "$3" = "n[1-3]" ] && printf "n1\\nn2\\nn3\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert nodes.expand_hosts("n[1-3]") == ["n1", "n2", "n3"]
    with pytest.raises(BadInputError, match="scontrol show hostnames"):
        nodes.expand_hosts("m[1-2]")


def test_cores_are_shared_among_the_ranks_and_each_has_one():
    cores = len(os.sched_getaffinity(0))
    assert nodes.threads_per_rank(1, {}) == cores
    assert nodes.threads_per_rank(10 * cores, {}) == 1


def test_a_second_start_of_a_running_run_is_refused_and_told_by_whom(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    refused = pytest.raises(BadInputError, match=f"process {os.getpid()} runs on this host")
    with lock.hold(tmp_path), refused, lock.hold(tmp_path):
        pass
    assert not (tmp_path / lock.NAME).exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    holder = {"host": socket.gethostname(), "job_id": None, "pid": process.pid, "started": "1", "time": "then"}
    (tmp_path / lock.NAME).write_text(json.dumps(holder))
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_a_process_id_used_again_is_not_taken_for_the_holder(tmp_path):
    holder = {"host": socket.gethostname(), "job_id": None, "pid": os.getpid(), "started": "1"}
    assert lock.reason_to_respect(holder) is None


def test_a_lock_of_another_host_without_slurm_is_respected():
    holder = {"host": "elsewhere", "job_id": None, "pid": 1, "started": "1"}
    assert "cannot be told" in lock.reason_to_respect(holder)


@pytest.mark.parametrize(
    ("script", "held"),
    [
        ("echo RUNNING", True),
        ("echo COMPLETED", False),
        ("true", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
    ],
)
def test_the_lock_of_another_job_stands_while_slurm_runs_it(tmp_path, monkeypatch, script, held):
    tool = tmp_path / "squeue"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    holder = {"host": "elsewhere", "job_id": "11", "pid": 1, "started": "1", "restarts": "0"}
    assert (lock.reason_to_respect(holder) is not None) == held


def other_jobs_lock(tmp_path, monkeypatch, squeue):
    """A run folder that job 11 has left locked, seen by job 12."""
    tool = tmp_path / "squeue"
    tool.write_text(f"#!/bin/sh\n{squeue}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr(queue, "PATIENCE_S", 30.0)
    monkeypatch.setattr(queue, "LONGEST_PAUSE_S", 0.05)
    holder = {"host": "elsewhere", "job_id": "11", "pid": 1, "started": "1", "restarts": "0", "time": "then"}
    run = tmp_path / "run"
    run.mkdir()
    (run / lock.NAME).write_text(json.dumps(holder))
    return run


BUSY = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


def test_squeue_that_is_silent_for_a_while_does_not_end_a_resume(tmp_path, monkeypatch):
    tries = tmp_path / "tries"
    run = other_jobs_lock(
        tmp_path, monkeypatch, f"echo x >> {tries}; [ $(wc -l < {tries}) -gt 2 ] || {{ {BUSY}; }}; echo NODE_FAIL"
    )
    with lock.hold(run):
        assert json.loads((run / lock.NAME).read_text())["job_id"] == "12"


def test_squeue_that_stays_silent_is_no_bad_input(tmp_path, monkeypatch):
    run = other_jobs_lock(tmp_path, monkeypatch, BUSY)
    monkeypatch.setattr(queue, "PATIENCE_S", 0.3)
    with pytest.raises(CrashError, match="Unable to contact") as caught, lock.hold(run):
        pass
    assert caught.value.exit_code == 5


def test_without_squeue_the_batch_script_says_which_jobs_have_ended(tmp_path, monkeypatch):
    run = other_jobs_lock(tmp_path, monkeypatch, "true")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BadInputError, match="no squeue in PATH"), lock.hold(run):
        pass
    monkeypatch.setenv(holders.ENDED_JOBS, "9 11")
    with lock.hold(run):
        pass


def test_of_many_who_take_over_a_dead_lock_one_gets_it(tmp_path):
    program = Path(__file__).resolve().parents[2] / "drills/lock_rounds.py"
    done = subprocess.run([sys.executable, program, tmp_path, "50"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_file_system_without_hard_links_is_locked_as_well(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with lock.hold(tmp_path), pytest.raises(BadInputError, match="runs on this host"), lock.hold(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_half_written_lock_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "UNREADABLE_S", 0.2)
    (tmp_path / lock.NAME).write_text("")
    with lock.hold(tmp_path) as held:
        held.check()


def test_a_start_that_was_taken_for_dead_notices_and_commits_nothing(tmp_path):
    with lock.hold(tmp_path, "7-0") as held:
        held.check()
        lock.check_attempt(tmp_path, "7-0")
        other = json.dumps({"job_id": "7", "host": "node3", "attempt": "7-1"})
        (tmp_path / lock.NAME).write_text(other)
        with pytest.raises(CrashError, match="no longer this start's: its lock belongs to job 7 on node3"):
            held.check()
        with pytest.raises(CrashError, match="belongs to start 7-1 by now, this is 7-0"):
            lock.check_attempt(tmp_path, "7-0")
    assert (tmp_path / lock.NAME).read_text() == other, "the lock of the other start stays"


def test_ranks_end_when_another_start_owns_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "CHECK_EVERY", 0.05)
    monkeypatch.setattr(launch, "command_of", lambda *_: ["sleep", "600"])

    def lost():
        raise CrashError("lost")

    begin = time.monotonic()
    with pytest.raises(CrashError, match="lost"):
        launch.run_ranks(nodes.detect("cpu", 1, {}), launch.Start(tmp_path, "cpu", {}), lost)
    assert time.monotonic() - begin < 300


def test_a_requeued_job_takes_over_its_own_lock_from_another_host(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    holder = {"host": "elsewhere", "job_id": "12", "pid": 1, "started": "1", "restarts": "0"}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert lock.reason_to_respect(holder) is not None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert lock.reason_to_respect(holder) is None


def test_a_requeued_job_takes_over_its_own_lock_from_a_container_of_the_same_host(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    before = holders.own() | {"restarts": "0"}
    assert "runs on this host" in lock.reason_to_respect(before)  # an orphan that is seen to live
    before["pids"] = "pid:[1]"
    assert lock.reason_to_respect(before) is None
    assert lock.reason_to_respect(before | {"restarts": "1"}) is not None
    assert lock.reason_to_respect(before | {"job_id": None}) is not None


def example_run(tmp_path, **changes):
    chosen = settings(**changes)
    steps = schedule.plan(chosen, rows=20, world_size=2)
    return stage.Run("abc", tmp_path / "runs/abc", tmp_path, tmp_path / "base", tmp_path / "tokens", chosen, steps, {})


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
@pytest.mark.parametrize("strategy", ["zero3", "zero3_offload"])
def test_what_the_ranks_are_told_is_data_and_reads_back_the_same(tmp_path, accelerator, strategy):
    run = example_run(tmp_path, strategy=strategy, sequence_parallel_size=2, learning_rate=3e-7, weight_decay=0.1)
    told = config.of(run, nodes.detect("cpu", 2, {}), accelerator)
    files.write_json(tmp_path / "engine.json", told.as_json())
    assert config.EngineConfig.from_json(json.loads((tmp_path / "engine.json").read_text())) == told
    assert told.settings == run.settings and told.schedule == run.schedule
    zero = told.deepspeed["zero_optimization"]
    assert zero["stage"] == 3
    assert ("offload_optimizer" in zero) == (strategy == "zero3_offload")
    assert told.deepspeed["gradient_clipping"] == run.settings.max_grad_norm


def test_the_command_starts_every_rank_of_this_node_and_no_rendezvous_server(tmp_path):
    start = launch.Start(tmp_path, "cuda", {"start": 60, "step": 30.0, "save": 60}, tmp_path / "stop")
    command = launch.command_of(nodes.detect("cuda", 8, SLURM), start)
    text = " ".join(command)
    for part in (
        "--nnodes 2",
        "--node-rank 1",
        "--nproc-per-node 8",
        "--master-addr alpha",
        "--master-port 24711",
        "--hang-step 30.0",
    ):
        assert part in text
    assert "--rdzv" not in text


def test_what_the_user_sets_for_the_ranks_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    start = launch.Start(tmp_path, "cuda", {})
    environment = launch.environment_of(nodes.detect("cuda", 2, {}), start)
    assert environment["OMP_NUM_THREADS"] == "5"
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["NCCL_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize("own", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_gpus_get_expandable_segments_unless_the_user_says_what_the_allocator_does(monkeypatch, tmp_path, own):
    node = nodes.detect("cuda", 2, {})
    found = launch.environment_of(node, launch.Start(tmp_path, "cuda", {}))
    assert found["PYTORCH_ALLOC_CONF"].startswith("expandable_segments:True")
    assert "PYTORCH_ALLOC_CONF" not in launch.environment_of(node, launch.Start(tmp_path, "cpu", {}))
    monkeypatch.setenv(own, "max_split_size_mb:512")
    found = launch.environment_of(node, launch.Start(tmp_path, "cuda", {}))
    assert {name: found.get(name) for name in launch.ALLOCATOR_NAMES if name in found} == {own: "max_split_size_mb:512"}


def test_secrets_reach_the_ranks_by_their_environment_alone(monkeypatch, tmp_path):
    secrets = tmp_path / "secrets"
    secrets.write_text("HF_TOKEN=canary\n")
    secrets.chmod(0o600)
    monkeypatch.setenv(secrets_file.VARIABLE, str(secrets))
    start, node = launch.Start(tmp_path, "cuda", {}), nodes.detect("cuda", 2, {})
    assert launch.environment_of(node, start)["HF_TOKEN"] == "canary"
    assert "canary" not in " ".join(launch.command_of(node, start))


def test_a_crash_is_told_by_its_first_rank_and_names_the_silent_ones(tmp_path):
    node = nodes.detect("cpu", 3, {})
    folder = launch.attempt_folder(tmp_path, node.attempt)
    logs = folder / "node0" / "x" / "attempt_0" / "1"
    logs.mkdir(parents=True)
    (logs / "stderr.log").write_text("line one\nline two\n")
    for rank, when, error in ((0, 20.0, "ConnectionError: peer"), (1, 10.0, "ValueError: first cause")):
        record = {"rank": rank, "host": "h", "time": when, "error": error, "traceback": ""}
        (folder / f"failure-rank{rank}.json").write_text(json.dumps(record))
    told = launch.explain_failure(tmp_path, node)
    assert "rank 1 on h: ValueError: first cause" in told
    assert "rank 2 (killed" in told
    assert "line two" in told


@pytest.mark.parametrize(
    ("words", "endings", "notes", "first"),
    [
        ({}, {}, {0: 100.0}, "node0"),
        ({}, {}, {}, None),
        ({3: 100.4}, {1: {3: 1, 2: -15}}, {0: 100.0, 1: 100.9}, "node0"),  # rank 3 has lost node 0's ranks
        ({3: 99.9}, {}, {0: 100.0}, "node0"),  # it saw them go before their program saw the signal
        ({3: 98.0}, {1: {3: 1, 2: -15}}, {0: 100.0}, None),  # it crashed, then Slurm terminated node 0
        ({0: 99.0}, {1: {3: -9, 2: -15}}, {0: 101.0}, None),  # rank 3 was killed, then Slurm terminated node 0
        ({}, {1: {3: 1, 2: -15}}, {0: 101.0}, None),  # rank 3 ended without a word
        ({}, {1: {3: -2, 2: -15}}, {0: 101.0}, "node0"),
    ],
)
def test_a_termination_is_told_from_a_crash_by_what_came_first(tmp_path, words, endings, notes, first):
    node = nodes.NodeEnvironment(2, 0, "alpha", 20000, 2, None, "start", ("alpha", "beta"))
    folder = launch.attempt_folder(tmp_path, "start")
    folder.mkdir(parents=True)
    for rank, when in words.items():
        (folder / f"failure-rank{rank}.json").write_text(json.dumps({"rank": rank, "time": when}))
    for number, codes in endings.items():
        (folder / f"endings-node{number}.json").write_text(json.dumps(codes))
    for number, when in notes.items():
        note = {"time": when, "host": f"node{number}", "signal": 15}
        (folder / f"terminated-node{number}.json").write_text(json.dumps(note))
    found = launch.termination(tmp_path, node)
    assert (found and found["host"]) == first


@pytest.mark.parametrize(
    ("codes", "heard", "told", "shown"),
    [
        ({0: -15, 1: -9, 2: -15}, [], ["rank 1 (killed from outside, or out of memory: SIGKILL)"], 1),
        ({0: 1, 1: -9, 2: -15}, [0], ["rank 0 on h: lost its peer", "rank 1 (killed"], 1),
        ({0: 1, 1: -15, 2: -15}, [0], ["rank 0 on h: lost its peer"], 0),
        ({0: -15, 1: -15, 2: -11}, [], ["rank 2 (ended by SIGSEGV)"], 2),
        ({0: 1, 1: -15, 2: 1}, [], ["rank 0, 2 (exit code 1)"], 0),
        ({0: -15, 1: -15, 2: -15}, [], ["rank 0, 1, 2 (ended by SIGTERM)"], 0),
    ],
)
def test_a_killed_rank_is_told_apart_from_those_that_torchrun_stopped(tmp_path, codes, heard, told, shown):
    node = nodes.detect("cpu", 3, {})
    folder = launch.attempt_folder(tmp_path, node.attempt)
    for rank in range(3):
        logs = folder / "node0" / "x" / "attempt_0" / str(rank)
        logs.mkdir(parents=True)
        (logs / "stderr.log").write_text(f"log of rank {rank}\n")
    for rank in heard:
        record = {"rank": rank, "host": "h", "time": 10.0, "error": "lost its peer", "traceback": ""}
        (folder / f"failure-rank{rank}.json").write_text(json.dumps(record))
    (folder / "endings-node0.json").write_text(json.dumps(codes))
    *lines, title, log = launch.explain_failure(tmp_path, node).splitlines()
    assert len(lines) == len(told)
    assert all(part in line for part, line in zip(told, lines, strict=True))
    assert title.startswith(f"last lines of rank {shown} ")
    assert log == f"  | log of rank {shown}"
