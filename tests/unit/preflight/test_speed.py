"""Promises about speed: the slow device or node is named with figures, a healthy one is not; the best nodes train."""

import json
import subprocess
import sys

import pytest

from deepseek_sft import time_limits
from deepseek_sft.preflight import affinity, bandwidth, judge, spares
from deepseek_sft.preflight.settings import Settings

HOSTS = ["a", "b", "c", "d"]


def loads(**by_host) -> dict[int, dict]:
    """What four healthy nodes of 8 GPUs measure: no two alike, within 4 %."""
    found = {}
    for rank, host in enumerate(HOSTS):
        healthy = {
            "gemm_tflops": [690.0 - 3 * rank - gpu for gpu in range(8)],
            "memory_gb_per_second": 400.0 + 5 * rank,
            "nvlink_gb_per_second": 360.0 + 2 * rank,
        }
        found[rank] = {"host": host, "findings": [], "load": healthy | by_host.get(host, {})}
    return found


def test_healthy_nodes_are_not_slow():
    assert judge.slower(HOSTS, loads(), 10) == []


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ({"gemm_tflops": [690.0] * 3 + [500.0] + [690.0] * 4}, "gemm", ("device 3: 500 TFLOP/s", "27 % below")),
        ({"memory_gb_per_second": 200.0}, "memory_bandwidth", ("200 GB/s", "51 % below the median 405 of 4")),
        ({"nvlink_gb_per_second": 40.0}, "nvlink", ("40 GB/s inside the node", "89 % below")),
    ],
)
def test_the_slow_one_is_named_against_the_median_with_figures(fault, check, words):
    (problem,) = judge.slower(HOSTS, loads(c=fault), 10)
    assert (problem.node, problem.check) == ("c", check)
    for word in words:
        assert word in problem.text


def test_of_two_the_slower_is_named_and_where_nothing_is_allowed_nothing_is_judged():
    slow = loads(b={"nvlink_gb_per_second": 200.0})
    two = {rank: slow[rank] for rank in (0, 1)}
    assert [problem.node for problem in judge.slower(HOSTS, two, 10)] == ["b"]
    assert judge.slower(HOSTS, two, None) == []


def test_cpu_nodes_are_judged_only_where_the_configuration_says_so():
    assert Settings().slower_than("cuda") == 10
    assert Settings().slower_than("cpu") is None
    assert Settings(slow_percent=30).slower_than("cpu") == 30


# ------------------------------------------------------------------------------------------------------ spare nodes


def test_the_nodes_that_pass_train_and_the_others_are_told_why():
    problems = [judge.Problem("b", "disk", "full")]
    chosen = spares.choose(HOSTS, ["b"], ["c"], loads(), 2)
    assert chosen == ["a", "d"]
    assert spares.why_left_out(HOSTS, chosen, problems, {"c": {"text": "rank 17 was slow"}}) == {
        "b": "disk: full",
        "c": "rank 17 was slow",
    }


def test_the_slowest_nodes_are_spare_and_noise_is_no_reason_to_leave_the_first():
    slow = loads(a={"gemm_tflops": [684.0] * 8}, c={"gemm_tflops": [640.0] * 8})
    assert spares.choose(HOSTS, [], [], slow, 3) == ["a", "b", "d"]


def test_a_node_that_was_slow_before_trains_where_nobody_else_can():
    assert spares.choose(HOSTS, ["a", "b"], ["c"], loads(), 2) == ["c", "d"]
    assert spares.choose(HOSTS, ["a", "b", "d"], ["c"], loads(), 2) == ["c"]


# --------------------------------------------------------------------------------------------------------- affinity


@pytest.fixture
def topology(tmp_path):
    """Two sockets of four cores with two threads each, as Linux shows them."""
    for cpu in range(16):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(str(cpu % 8 // 4))
        (folder / "core_id").write_text(str(cpu % 4))
    gpus = tmp_path / "gpus"
    for gpu in range(8):
        (gpus / str(gpu)).mkdir(parents=True)
    return {"topology": tmp_path, "gpus": gpus}


def test_a_job_with_all_cores_passes_and_says_where_they_are(topology):
    finding, same = affinity.affinity("cuda", 8, {"SLURM_CPUS_ON_NODE": "16"}, range(16), **topology)
    assert finding.passed is True
    assert "16 of the node's 16 CPUs, 8 of 8 cores, on sockets 0, 1" in finding.detail
    assert same["CPUs of the job"] == "16"


@pytest.mark.parametrize(
    ("mine", "slurm", "words"),
    [
        ([0, 1, 2, 3, 8, 9, 10, 11], "8", "at most half of the 8 cores that go with 8 of 8 GPUs"),
        ([0], "16", "Slurm has given the job 16"),
    ],
)
def test_a_job_that_is_bound_to_too_few_cores_is_told(topology, mine, slurm, words):
    finding, _ = affinity.affinity("cuda", 8, {"SLURM_CPUS_ON_NODE": slurm}, mine, **topology)
    assert finding.passed is False
    assert words in finding.detail


def test_half_of_the_cores_is_right_for_half_of_the_gpus(topology):
    mine = [0, 1, 2, 3, 8, 9, 10, 11]
    finding, _ = affinity.affinity("cuda", 4, {"SLURM_CPUS_ON_NODE": "8"}, mine, **topology)
    assert finding.passed is True


def test_the_machine_s_cpus_are_read_as_the_kernel_writes_them(tmp_path):
    (tmp_path / "effective").write_text("0-3,8,10-11\n")
    assert affinity._usable([tmp_path / "none", tmp_path / "effective"]) == {0, 1, 2, 3, 8, 10, 11}
    (tmp_path / "effective").write_text("\n")
    assert affinity._usable([tmp_path / "effective"]) == set()


# ------------------------------------------------------------------------------------------- clocks of the measurement


def run_stages(tmp_path, program: str, limit: time_limits.UnderLoad):
    output = tmp_path / "rank0"
    with open(output, "wb") as stream:
        process = subprocess.Popen([sys.executable, "-uc", f"import time\n{program}"], stdout=stream)
    return bandwidth._wait([process], [output], limit)


def test_a_slow_import_does_not_use_up_the_time_of_the_measurement(tmp_path):
    program = 'time.sleep(1.5); print(\'{"stage": "loaded"}\'); print(\'{"stage": "joined"}\'); time.sleep(0.2)'
    assert run_stages(tmp_path, program, time_limits.UnderLoad(60, 60, 30)) is None


@pytest.mark.parametrize(
    ("program", "limit", "what"),
    [
        ("time.sleep(60)", (1, 60, 60), "did not import torch within 1 s"),
        ("print('\"loaded\"'); time.sleep(60)", (60, 1, 60), "did not meet all other ranks within 1 s"),
        ('print(\'"loaded" "joined"\'); time.sleep(60)', (60, 60, 1), "did not end within 1 s"),
    ],
)
def test_the_stage_that_takes_too_long_is_named(tmp_path, program, limit, what):
    assert run_stages(tmp_path, program, time_limits.UnderLoad(*limit)) == (0, what)


def test_figures_of_a_node_come_from_all_its_ranks():
    told = [
        {"ranks": 4, "gemm_tflops": 600.0 + rank, "memory_gb_per_second": 50.0, "correct": True, "gb_per_second": 9.0}
        for rank in range(2)
    ]
    findings, facts = bandwidth._read(json.loads(json.dumps(told)), "nccl", 1024)
    assert facts["gemm_tflops"] == [600.0, 601.0]
    assert facts["memory_gb_per_second"] == 100.0
    assert [finding.check for finding in findings] == ["gemm", "memory_bandwidth", "all_reduce"]
