"""Containers of a stage: how they are started, what they must see, and what is refused before any job."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deepseek_sft import config, containers
from deepseek_sft.containers import Mount
from deepseek_sft.errors import BadInputError
from deepseek_sft.experiment import Experiment
from deepseek_sft.slurm import nodes

PROJECT = Path(__file__).resolve().parents[2]


def experiment_of(own: dict, **more) -> Experiment:
    shipped = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    values = {"experiment": "a", "data": {"sources": ["x.jsonl"]}, "model": {"base": "base"}, "envs": {"train": own}}
    return Experiment.from_config(config.merge(shipped, values | more))


def pyxis(image: str, *mounts: str) -> dict:
    shown = [f"--container-mounts={','.join(mounts)}"] if mounts else []
    return {"python": "/opt/env/bin/python", "srun": [f"--container-image={image}", *shown]}


def started_by(runtime: str, image: str, *mounts: str, options: tuple[str, ...] = ()) -> dict:
    given = {"runtime": runtime, "image": image, "mounts": list(mounts), "options": list(options)}
    return {"python": "/opt/env/bin/python", "container": given}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A project with a base beside it and an image, the work folder of this process."""
    for name in ("project", "base", "images/train"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "project/x.jsonl").touch()
    (tmp_path / "project/base").symlink_to(tmp_path / "base")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path


RULES = ("train",)


@pytest.mark.parametrize("kind", ["pyxis", "apptainer", "podman"])
def test_a_container_that_sees_project_results_and_base_starts(kind, site):
    image, mounts = str(site / "images/train"), [str(site / "project"), f"{site}/base:{site}/base:ro"]
    own = pyxis(image, *mounts) if kind == "pyxis" else started_by(kind, image, *mounts)
    experiment_of(own).check_external_paths(RULES)


@pytest.mark.parametrize("kind", ["pyxis", "apptainer", "podman"])
def test_an_image_that_is_not_there_is_refused_by_its_path(kind, site):
    image = str(site / "images/other.sqsh")
    own = pyxis(image, str(site)) if kind == "pyxis" else started_by(kind, image, str(site))
    key = "envs.train.srun" if kind == "pyxis" else "envs.train.container.image"
    with pytest.raises(BadInputError, match=re.escape(f"{key}: {image} does not exist")):
        experiment_of(own).check_external_paths(RULES)


def test_a_folder_that_no_mount_shows_is_refused_by_its_path(site):
    own = pyxis(str(site / "images/train"), str(site / "project"))
    with pytest.raises(BadInputError) as refused:
        experiment_of(own).check_external_paths(RULES)
    assert f"model.base: {site}/base, where base leads, is not seen in the container" in refused.value.problem
    assert "results" not in refused.value.problem


def test_a_folder_that_is_another_one_inside_is_refused(site):
    own = started_by("podman", str(site / "images/train"), str(site / "project"), f"{site}/images:{site}/base")
    problems = experiment_of(own).unseen_in_containers(RULES)
    assert [f"{site}/images in the container" in one for one in problems] == [True]


def test_results_on_a_mount_that_is_read_only_are_refused(site):
    own = started_by("apptainer", str(site / "images/train"), str(site), f"{site}/out:{site}/out:ro")
    (site / "out").mkdir()
    problems = experiment_of(own, results=str(site / "out")).unseen_in_containers(RULES)
    assert problems == [
        f"envs.train.container.mounts: results: {site}/out is written, and {site}/out:{site}/out:ro is read-only"
    ]


def test_the_nodes_own_folder_for_checkpoints_must_be_seen_in_the_container(site):
    own = started_by("podman", str(site / "images/train"), str(site))
    tiers = [{"path": "/local/sft", "every_minutes": 15}, {"every_minutes": 240}]
    problems = experiment_of(own, train={"checkpoints": tiers}).unseen_in_containers(RULES)
    assert problems == ["envs.train.container.mounts: train.checkpoints: /local/sft is not seen in the container"]


def test_what_runs_outside_of_the_container_asks_for_no_mounts(site):
    own = pyxis(str(site / "images/train"))
    assert experiment_of(own).unseen_in_containers(("prepare_data", "convert_checkpoint", "smoke_test")) == []


@pytest.mark.parametrize(
    "own",
    [
        pyxis("nvcr.io#nvidia/pytorch:25.09-py3", "/shared:/shared"),
        started_by("apptainer", "docker://registry/train:1", "/shared"),
        started_by("podman", "localhost/train:1", "/shared"),
    ],
)
def test_an_image_that_cannot_be_judged_here_is_said(own, site):
    assert any("cannot be told here" in note for note in experiment_of(own).notes)


@pytest.mark.parametrize(
    "own, said",
    [
        ({"srun": ["--nodes=2"]}, "--nodes is the workflow's"),
        ({"srun": ["--gres=gpu:4"]}, "--gres is the workflow's"),
        ({"srun": ["--container-image"]}, "write --container-image=…"),
        ({"srun": ["--container-image=a", "--container-mounts=data:/data"]}, "begins with /"),
        ({"srun": ["--mpi pmix"]}, "not one word"),
        ({"srun": ["-N2"]}, "not one word"),
        ({"srun": ["--container-image=a", "--container-image=b"]}, "twice"),
        ({"container": {"runtime": "docker", "image": "a"}}, "one of apptainer, podman"),
        ({"container": {"runtime": "podman", "image": "a", "mounts": ["data"]}}, "SOURCE:TARGET"),
        (started_by("podman", "a") | {"srun": ["--container-image=b"]}, "srun starts one already"),
        (started_by("podman", "a") | {"cuda_compat": "/compat"}, "into the image"),
    ],
)
def test_what_cannot_start_is_refused_with_what_to_write(own, said, site):
    with pytest.raises(BadInputError, match=re.escape(said)):
        experiment_of({"python": "python3"} | own)


def test_an_evaluation_beside_a_model_served_in_a_container_needs_a_python_inside_it():
    shipped = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    task = {"data": "t.jsonl"}
    values = {"experiment": "a", "data": {"sources": ["x.jsonl"]}, "model": {"base": "base"}}
    values |= {"evaluate": {"tasks": {"own": task}}, "envs": {"serve": pyxis("/images/vllm")}}
    with pytest.raises(BadInputError, match=r"envs\.evaluate: the model is served in a container"):
        Experiment.from_config(config.merge(shipped, values))
    values["envs"]["evaluate"] = {"python": "/opt/lm-eval/bin/python"}
    Experiment.from_config(config.merge(shipped, values))


def test_options_of_srun_without_a_container_stay_as_they_are():
    words = ["--mpi=pmix", "--network=single_node_vni"]
    assert containers.srun_options({"srun": words}, "/project", ["NCCL_DEBUG"]) == words
    assert containers.launcher({"srun": words}, "/project", "cuda") == []
    assert containers.of("train", {"srun": words}) is None


def test_pyxis_is_told_the_folder_and_the_variables_unless_the_user_says_other_ones():
    own = {"srun": ["--container-image=a", "--container-workdir=/w", "--container-env=HOME"]}
    *same, variables = containers.srun_options(own, "/project", ["NCCL_DEBUG"])
    assert same == ["--container-image=a", "--container-workdir=/w"]
    assert variables.removeprefix("--container-env=").split(",")[0] == "HOME"
    assert {"PYTHONPATH", "NCCL_DEBUG"} <= set(variables.removeprefix("--container-env=").split(","))


def test_gpus_are_asked_for_where_there_are_some():
    apptainer, podman = (started_by(name, "image", "/shared") for name in ("apptainer", "podman"))
    assert "--nv" in containers.launcher(apptainer, "/p", "cuda")
    assert "--nv" not in containers.launcher(apptainer, "/p", "cpu")
    assert "--device=nvidia.com/gpu=all" in containers.launcher(podman, "/p", "cuda")
    assert not any("nvidia" in word for word in containers.launcher(podman, "/p", "cpu"))


def test_podman_runs_an_unpacked_image_without_writing_to_it(tmp_path):
    words = containers.launcher(started_by("podman", str(tmp_path), options=("--memory=1g",)), "/p", "cpu")
    assert words[words.index("--rootfs") + 1] == f"{tmp_path}:O"
    assert "--memory=1g" in words


@pytest.mark.parametrize(
    "text, mount",
    [
        ("/a", Mount("/a", "/a")),
        ("/a:/b", Mount("/a", "/b")),
        ("/a:/b:ro", Mount("/a", "/b", True)),
        ("/a:/b:ro+x-create=dir", Mount("/a", "/b", True)),
    ],
)
def test_mounts_are_read_as_runtimes_write_them(text, mount):
    assert Mount.read(text) == mount


LISTS = {
    "n1": ["n1"],
    "n[1-3]": ["n1", "n2", "n3"],
    "gpu[008-010],login": ["gpu008", "gpu009", "gpu010", "login"],
    "r[1-2]n[1,3-4],x": ["r1n1", "r1n3", "r1n4", "r2n1", "r2n3", "r2n4", "x"],
    "a[9-11]-ib": ["a9-ib", "a10-ib", "a11-ib"],
}


@pytest.mark.parametrize("text", LISTS)
def test_node_lists_are_expanded_without_scontrol_as_by_it(text, monkeypatch):
    program = shutil.which("scontrol")
    if program:
        listed = subprocess.run([program, "show", "hostnames", text], capture_output=True, text=True, check=False)
        assert listed.returncode or listed.stdout.split() == LISTS[text]
    monkeypatch.setenv("PATH", "")
    assert nodes.expand_hosts(text) == LISTS[text]


@pytest.mark.parametrize("text", ["n[1-", "n[a-b]", "n[]", "[", "n[3-1]x]"])
def test_a_damaged_node_list_is_refused_without_scontrol(text, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadInputError, match="no scontrol in PATH"):
        nodes.expand_hosts(text)


def test_addresses_that_the_batch_script_found_are_taken(monkeypatch):
    monkeypatch.setenv(nodes.ADDRESSES, " node-a.invalid=10.0.0.1 node-b.invalid=fd00::2")
    nodes.address_of.cache_clear()
    found = [nodes.address_of(f"node-{name}.invalid") for name in "ab"]
    nodes.address_of.cache_clear()
    assert found == ["10.0.0.1", "fd00::2"]


def test_the_files_of_the_containerfile_suffice_to_build_every_locked_environment(tmp_path):
    """Its base has Python alone; a name without a lock is answered with those that have one."""
    lines = (PROJECT / "envs/Containerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            *sources, target = line.split()[1:]
            place = tmp_path / target.lstrip("/")
            for source in sources:
                if (PROJECT / source).is_dir():
                    shutil.copytree(PROJECT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    place.mkdir(parents=True, exist_ok=True)
                    shutil.copy(PROJECT / source, place)
    command = [sys.executable, "-E", "-S", tmp_path / "build/workflow/scripts/build_env.py", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    locks = sorted(path.stem for path in (PROJECT / "envs").glob("*.txt") if not path.stem.endswith(".no-deps"))
    assert done.returncode == 2 and f"choose one of: {', '.join(locks)}" in done.stderr, done.stderr


def test_gloo_takes_the_interface_of_the_address_that_was_found_outside():
    told = {"SLURMD_NODENAME": "node1", nodes.ADDRESSES: "node1=127.0.0.1 node2=10.0.0.2"}
    assert nodes.gloo_interface(2, told) == "lo"
    assert nodes.gloo_interface(2, told | {"SLURMD_NODENAME": "node2"}) is None  # no interface of this machine
    assert nodes.gloo_interface(2, {"SLURMD_NODENAME": "node1"}) is None
    assert nodes.gloo_interface(1, {}) == "lo"
