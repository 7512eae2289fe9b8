"""What is read from the logs of serving processes: phases, last lines, exceptions, causes."""

import pytest

from deepseek_sft.serving import failures, memory_kills, server_logs


def test_phase_is_the_last_milestone_in_the_log(tmp_path):
    log = tmp_path / "n0.log"
    reader = server_logs.PhaseReader(log)
    assert reader.update() == "starting Python"
    log.write_text("Starting to load model x...\nLoading safetensors checkpoint shards:  10% Completed | 1/10\r")
    assert reader.update() == "loading weights, 10 %"
    with open(log, "a") as stream:
        stream.write("Loading safetensors checkpoint shards: 100% Completed | 10/10\nnothing\n")
    assert reader.update() == "loading weights, 100 %"
    with open(log, "a") as stream:
        stream.write("Loading weights took 3 seconds\nCapturing CUDA graphs (mixed): 50%|\n")
    assert reader.update() == "capturing CUDA graphs, 50 %"


def test_last_lines_show_the_last_state_of_a_progress_bar(tmp_path):
    log = tmp_path / "n0.log"
    log.write_text("a\n\nb 10%\rb 20%\rb 30%\nlast\n")
    assert server_logs.last_lines(log, 2) == ["b 30%", "last"]


def test_first_exceptions_are_found_behind_the_logs_prefixes(tmp_path):
    log = tmp_path / "n0.log"
    log.write_text("ValueError: of an earlier start\n")
    start = log.stat().st_size
    with open(log, "a") as stream:
        stream.write("WARNING fd limit errors like `OSError: [Errno 24]` may come\n")
        stream.write("(EngineCore pid=7) ERROR 11-24 05:18:18 [core.py:1510] RuntimeError: open shm failed\n")
        stream.write("\x1b[36m(Worker pid=8)\x1b[0m torch.OutOfMemoryError: CUDA out of memory\n")
        stream.write(
            "(EngineCore pid=7) ERROR 11-24 [ray_executor_v2.py:522] RayWorkerProc rank=[1] died unexpectedly\n"
        )
        stream.write("RuntimeError: open shm failed\nRuntimeError: See root cause above.\n")
    assert server_logs.exceptions(log, start) == [
        "RuntimeError: open shm failed",
        "torch.OutOfMemoryError: CUDA out of memory",
        "RayWorkerProc rank=[1] died unexpectedly",
        "RuntimeError: See root cause above.",
    ]


def test_worker_that_ray_has_lost_is_found_with_its_address_in_the_heads_log(tmp_path):
    log = tmp_path / "n0.log"
    prefix = "(EngineCore pid=461) ERROR 11-24 12:28:01 [core.py:1510] "
    text = "\tclass_name: RayWorkerProc\n\tactor_id: 72d1ea\n\tpid: 339\n\tname: vllm_PP1\n\tip: 10.0.0.2"
    words = f"ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.\n{text}\n"
    log.write_text("(RayWorkerProc pid=12, ip=10.0.0.7) ready\n" + words.replace("\n", f"\n{prefix}") + "\r\n" + words)
    assert server_logs.dead_actors(log) == {"10.0.0.2": "339"}
    assert len(server_logs.exceptions(log)) == 1


def test_progress_names_the_nodes_where_they_differ(tmp_path):
    (tmp_path / "n1.log").write_text("Starting to load model of an earlier start\n")
    start = (tmp_path / "n1.log").stat().st_size
    progress = server_logs.Progress({"n0": (tmp_path / "n0.log", 0), "n1": (tmp_path / "n1.log", start)})
    assert progress.update() == "starting Python"
    (tmp_path / "n0.log").write_text("Loading safetensors checkpoint shards:  40% Completed | 4/10\n")
    assert progress.update() == "n0: loading weights, 40 %; n1: starting Python"


def report(node: str = "n1", exits: str = "ended with exit code 1", exceptions=(), lines=()) -> dict:
    return {
        "node": node,
        "process": "vllm",
        "exit": exits,
        "log": f"{node}.log",
        "exceptions": list(exceptions),
        "lines": list(lines),
    }


@pytest.mark.parametrize(
    ("line", "problem", "code"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.", "out of GPU memory", 2),
        ("ValueError: No available memory for the cache blocks.", "out of memory for the KV cache", 2),
        (
            "ValueError: (0.01 GiB KV cache is needed, which is larger than the available KV cache memory (0.0 GiB).",
            "out of memory for the KV cache",
            2,
        ),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "out of host memory", 2),
        ("OSError: [Errno 98] Address already in use", "a port was taken", 5),
        ("RuntimeError: DeepSeekR1 reasoning parser could not locate think start/end tokens", "the tokenizer lacks", 2),
        ("KeyError: 'layers.1.mlp.gate.e_score_correction_bias'", "the weights do not fit", 2),
        ("ValueError: Head dimension 96 is not supported by MLA.", "the model's attention dimensions", 2),
        ("torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:77", "NCCL failed", 5),
        ("RuntimeError: something that nobody has seen", "the deployment ended because of a failure", 5),
    ],
)
def test_known_cause_is_named_first_with_the_node_and_decides_the_exit_code(line, problem, code):
    failure = failures.NodeFailure([report(exceptions=["RuntimeError: See root cause above", line])])
    first = failure.problem.splitlines()[0]
    assert problem in first
    assert failure.exit_code == code
    if "because of a failure" not in problem:
        assert "n1" in first
        assert line in first
        assert failure.fix


def test_killed_process_is_the_cause_whatever_the_others_complain_about():
    complaint = report("n0", exceptions=["torch.distributed.DistNetworkError: Address already in use"])
    failure = failures.NodeFailure([complaint, report("n1", "was killed by SIGKILL")])
    assert failure.problem.splitlines()[1].startswith("n1: vllm was killed by SIGKILL")
    assert failure.exit_code == 5
    assert "mem_mb" in failure.fix


def test_process_that_the_kernel_killed_for_lack_of_memory_is_told_so_with_the_fix():
    ended = f"ended with exit code 1{failures.lack_of_memory(1)}"
    failure = failures.NodeFailure([report("n0", "is gone"), report("n1", ended)])
    assert failure.problem.splitlines()[0] == "the deployment ended: n1: out of host memory"
    assert "n1: vllm ended with exit code 1; the kernel killed 1 process here for lack of memory" in failure.problem
    assert failure.fix.startswith("raise `mem_mb` of this rule in the profile")
    assert failure.exit_code == 2


@pytest.mark.parametrize(
    ("membership", "file"),
    [
        ("0::/slurm/job_7/step_0/task_0", "slurm/job_7/step_0/task_0/memory.events"),
        ("4:cpuset,memory:/slurm/job_7\n0::/", "memory/slurm/job_7/memory.oom_control"),
    ],
    ids=["version 2", "version 1"],
)
def test_kernels_kills_are_read_from_the_groups_of_both_versions(tmp_path, membership, file):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(membership + "\n")
    assert memory_kills.count(tmp_path / "proc", tmp_path / "groups") == 0  # nobody counts here
    counted = tmp_path / "groups" / file
    counted.parent.mkdir(parents=True)
    counted.write_text("oom 4\noom_kill 3\noom_group_kill 0\n")
    assert memory_kills.count(tmp_path / "proc", tmp_path / "groups") == 3
