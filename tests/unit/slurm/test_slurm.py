"""Rendered sbatch scripts: golden files, and allocations."""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_sft import containers
from deepseek_sft.errors import BadInputError
from deepseek_sft.local_copies import LocalCopies
from deepseek_sft.slurm import sbatch
from deepseek_sft.slurm.sbatch import Allocation

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
CLUSTER = Allocation(
    nodes=32,
    cpus_per_task=96,
    mem_mb=1900000,
    runtime=5760,
    partition="gpu",
    gres="gpu:8",
    extra="--signal=USR1@3600 --exclusive",
    account="project-7",
)
CONTEXT = {
    "project": "/shared/project with space",
    "experiment": "r1",
    "results": "results/r1",
    "logs": "logs/r1",
    "python": ".envs/train/bin/python",
    "activate": "",
    "accelerator": "cuda",
    "environment": {"NCCL_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "WARN"},
    "ranks_per_node": None,
    "preflight": True,
    "spare_nodes": 0,
}
LOCAL = LocalCopies(".envs/train.tar", "/tmp/deepseek-sft-1000/train-0123", "/tmp/deepseek-sft-1000/code-4567")
SERVED = CONTEXT | {"python": ".envs/serve-cuda/bin/python", "environment": {}}
SERVING = dataclasses.replace(CLUSTER, cpus_per_task=96, mem_mb=500000, runtime=240, extra="--exclusive", account="")
CPU_NODE = Allocation(cpus_per_task=2, mem_mb=9000, runtime=30, partition="serve")
PYXIS = {
    "srun": [
        "--container-image=/shared/images/train.sqsh",
        "--container-mounts=/shared:/shared",
        "--network=single_node_vni",
    ]
}


def contained(context: dict, step: dict) -> dict:
    """The same stage in a container, as render_sbatch.py describes it."""
    return context | {
        "python": "/opt/env/bin/python",
        "srun": containers.srun_options(step, context["project"], context["environment"]),
        "launcher": containers.launcher(step, context["project"], context["accelerator"]),
        "host_python": "/shared/project/.envs/workflow/bin/python",
        "contained": True,
    }


def started_by(runtime: str) -> dict:
    return {"container": {"runtime": runtime, "image": "/shared/images/gpu.sif", "mounts": ["/shared"], "options": []}}


CASES = {
    "train.slurm": ("train", CLUSTER, CONTEXT | {"activate": "module load cuda/12.6"}),
    "train.spares": ("train", dataclasses.replace(CLUSTER, nodes=34), CONTEXT | {"spare_nodes": 2}),
    "train.local": ("train", Allocation(), CONTEXT | {"accelerator": "cpu", "ranks_per_node": 2, "preflight": False}),
    "train.node-local": ("train", CLUSTER, CONTEXT | {"python": LOCAL.python, "local": LOCAL}),
    "preflight.slurm": ("preflight", CLUSTER, CONTEXT),
    "rehearse.slurm": ("rehearse", dataclasses.replace(CLUSTER, runtime=60, extra="--exclusive"), CONTEXT),
    "smoke_test.slurm": ("smoke_test", CLUSTER, CONTEXT | {"python": ".envs/serve-cuda/bin/python"}),
    "smoke_test.bf16-4x8": ("smoke_test", dataclasses.replace(SERVING, nodes=4), SERVED),
    "smoke_test.fp8-2x8": ("smoke_test", dataclasses.replace(SERVING, nodes=2), SERVED),
    "smoke_test.cpu-1": (
        "smoke_test",
        CPU_NODE,
        SERVED | {"python": ".envs/serve-cpu/bin/python"},
    ),
    "serve.bf16-4x8": ("serve", dataclasses.replace(SERVING, nodes=4, runtime=10080), SERVED),
    "train.pyxis": ("train", CLUSTER, contained(CONTEXT, PYXIS)),
    "rehearse.podman": (
        "rehearse",
        dataclasses.replace(CLUSTER, runtime=60, extra="--exclusive"),
        contained(CONTEXT, started_by("podman")),
    ),
    "smoke_test.apptainer": (
        "smoke_test",
        dataclasses.replace(SERVING, nodes=2),
        contained(SERVED, started_by("apptainer")),
    ),
    "smoke_test.local": ("smoke_test", Allocation(), CONTEXT | {"environment": {}}),
}


@pytest.mark.parametrize("name", CASES)
def test_rendered_script_equals_its_golden_file(name):
    """A wanted change: render anew with `python tests/unit/slurm/test_slurm.py` and read the difference."""
    assert sbatch.render(*CASES[name]) == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("name", CASES)
def test_rendered_script_is_valid_bash(name, tmp_path):
    script = tmp_path / "script"
    script.write_text(sbatch.render(*CASES[name]))
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def test_script_asked_for_several_nodes_refuses_to_run_outside_slurm(tmp_path):
    script = tmp_path / "script"
    script.write_text(sbatch.render("train", Allocation(nodes=2), CONTEXT | {"project": str(tmp_path)}))
    done = subprocess.run(["bash", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "submit this file with sbatch" in done.stderr


# Module systems define a function that evaluates what a program prints; at an unknown module Lmod's prints `false`.
MODULE = """
module() { local answer; answer=$([ "$2" = cuda/12.6 ] && echo 'export CUDA_HOME=/opt/cuda' || echo false)
    [ -z "$__unset_in_batch" ] || return 7
    eval "$answer" && eval $(${LMOD_SETTARG_CMD:-:} -s sh); }
export -f module
"""


def activated(line: str, folder: Path, **how) -> subprocess.CompletedProcess:
    """The beginning of a script up to the end of the site's own line, in a shell as Slurm's batch shells are."""
    text = sbatch.render("train", Allocation(), CONTEXT | {"project": str(folder), "activate": line})
    begin, found, _ = text.partition("trap - EXIT TERM\n")
    assert found
    script = folder / "script"
    script.write_text(f"{begin}{found}echo loaded $CUDA_HOME\n")
    # A signal that this process ignores, as other tests may have it, could not be trapped.
    command = ["env", "--default-signal=TERM", "bash", "-c", f"{MODULE}\nexec bash {script}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]}, **how)


def test_a_module_is_loaded_by_the_function_of_the_shell_that_submits(tmp_path):
    done = activated("module load cuda/12.6", tmp_path)
    assert (done.returncode, done.stdout) == (0, "loaded /opt/cuda\n"), done.stderr


@pytest.mark.parametrize(
    "line", ["module load cuda/99", "module load cuda/99; module load cuda/12.6", "exit 9", "no-such"]
)
def test_a_line_of_the_site_that_fails_is_bad_input(line, tmp_path):
    done = activated(line, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the line `activate` of this stage (envs in the configuration) ended with" in done.stderr


def test_a_signal_during_the_sites_line_is_no_bad_input(tmp_path):
    done = activated("kill -TERM $$", tmp_path)
    assert done.returncode == 143
    assert "activate" not in done.stderr


def test_name_that_the_context_lacks_is_told():
    with pytest.raises(BadInputError, match="python"):
        sbatch.render("train", CLUSTER, {key: value for key, value in CONTEXT.items() if key != "python"})


@pytest.mark.parametrize(
    ("gres", "gpus"), [("gpu:8", 8), ("gpu:h100:4", 4), ("gpu", 1), ("", None), ("nvme:1,gpu:2", 2), ("tmp:5", None)]
)
def test_gpus_are_read_from_gres(gres, gpus):
    assert Allocation(gres=gres).gpus_per_node() == gpus


def test_allocation_without_a_node_is_refused():
    with pytest.raises(BadInputError, match="nodes is 0"):
        Allocation(nodes=0)


def test_a_warning_signal_before_the_job_begins_is_refused():
    with pytest.raises(BadInputError, match="told to stop as soon as it starts"):
        Allocation(runtime=60, extra="--exclusive --signal=USR1@3600")
    Allocation(runtime=61, extra="--exclusive --signal=USR1@3600")


def test_a_warning_signal_to_the_batch_shell_alone_is_refused():
    with pytest.raises(BadInputError, match="batch shell alone") as refused:
        Allocation(runtime=120, extra="--exclusive --signal=B:USR1@3600")
    assert "--signal=USR1@3600" in refused.value.fix
    Allocation(runtime=120, extra="--signal=R:USR1@3600")


def test_features_quality_of_service_and_further_options_reach_the_script():
    chosen = dataclasses.replace(
        CLUSTER, constraint="h100&rack1", qos="long", extra="--signal USR1@3600 --exclude='gpu-''n' --mail-user='a b'"
    )
    lines = sbatch.render("train", chosen, CONTEXT).splitlines()
    assert {"#SBATCH --constraint='h100&rack1'", "#SBATCH --qos=long", "#SBATCH --exclude=gpu-n"} <= set(lines)
    assert {"#SBATCH --signal USR1@3600", "#SBATCH --mail-user='a b'"} <= set(lines)


def test_arguments_of_an_allocation_make_the_same_one():
    chosen = dataclasses.replace(CLUSTER, constraint="h100", qos="long")
    words = dict(word.removeprefix("--").split("=", 1) for word in shlex.split(chosen.arguments()))
    fields = {field.name: field.type for field in dataclasses.fields(Allocation)}
    values = {name.replace("-", "_"): value for name, value in words.items()}
    assert (
        Allocation(**{name: int(one) if fields[name] in (int, "int") else one for name, one in values.items()})
        == chosen
    )


def test_jobs_by_hand_are_named_after_experiment_and_stage():
    assert "#SBATCH --job-name=r1-5_train\n" in sbatch.render("train", CLUSTER, CONTEXT | {"experiment": "r1.5"})


STUBS = {
    "squeue": 'case "$*" in *%x*) echo "gpu|32|node9";; *) echo "RUNNING $(cat comment)";; esac',
    "scontrol": 'if [ "$1" = show ]; then tr , "\\n" <<< "$3"; else echo "$*" >> asked; fi',
    "sinfo": 'seq -f node%g 1 "$(cat nodes)"',
    "srun": "exit 5",  # training crashed
}


@pytest.mark.parametrize(("nodes", "left_out"), [(34, True), (33, False)])
def test_a_requeued_job_leaves_slow_nodes_out_where_there_are_enough_others(nodes, left_out, tmp_path):
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    folder = tmp_path / "results/r1/train"
    folder.mkdir(parents=True)
    (folder / "slow_nodes.json").write_text('{"node7": {"text": "slow"}}')
    (tmp_path / "nodes").write_text(str(nodes))
    (tmp_path / "comment").write_text("rule_train r1 abc")
    context = CONTEXT | {"project": str(tmp_path), "python": sys.executable, "preflight": False}
    (tmp_path / "script").write_text(sbatch.render("train", CLUSTER, context))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "42"}
    command = ["bash", "script", "--in-workflow", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["requeue 42", *(["update JobId=42 ExcNodeList=node9,node7"] if left_out else [])]
    assert ("node7 would be left out as slow, but partition gpu has only 31 other nodes" in done.stdout) != left_out


CHOOSES = """
echo "$*" >> started
while [ $# -gt 0 ]; do
    if [ "$1" = --chosen ]; then printf 'node1\\nnode3\\n' > "$2"; fi
    shift
done
"""


def test_where_slurm_takes_no_nodes_back_what_keeping_them_costs_is_said_and_the_chosen_ones_train(tmp_path):
    stubs = {
        "squeue": 'case "$*" in *%D*) echo 4;; esac',
        "scontrol": 'echo "slurm_update error: Job update not available right now" >&2; exit 1',
        "srun": CHOOSES,
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "results/r1/train").mkdir(parents=True)
    context = CONTEXT | {"project": str(tmp_path), "python": sys.executable, "spare_nodes": 2}
    (tmp_path / "script").write_text(sbatch.render("train", Allocation(nodes=4, gres="gpu:8"), context))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "42", "SLURMD_NODENAME": "node1"}
    command = ["bash", "script", "--in-workflow", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Slurm takes no nodes back here: 2 nodes stay allocated and idle, 8 GPU hours an hour each" in done.stdout
    preflight, train = (tmp_path / "started").read_text().split("preflight.py")
    assert "--nodes=4 --ntasks=4 --ntasks-per-node=1" in preflight
    assert "--nodes=2 --ntasks=2 --nodelist=node1,node3 --ntasks-per-node=1" in train


if __name__ == "__main__":
    for case, arguments in CASES.items():
        (GOLDEN / f"{case}.sbatch").write_text(sbatch.render(*arguments))
