"""Environment and code on a node's own disk: there whole or not at all, once, and never in somebody else's folder."""

import os
import shutil
import subprocess
import sys

import pytest

from deepseek_sft import local_copies
from deepseek_sft.errors import BadInputError
from deepseek_sft.experiment import Experiment
from deepseek_sft.settings import field_types
from deepseek_sft.settings.envs import Local


@pytest.fixture
def site(tmp_path, project):
    """A built environment with its archive, a project, and a call of the script."""
    built = tmp_path / "store/train-01"
    (built / "bin").mkdir(parents=True)
    (built / "bin/python").symlink_to(sys.executable)
    (built / "lib.py").write_text("content")
    (built / "complete.json").write_text("{}")
    subprocess.run(["tar", "-cf", tmp_path / "store/train-01.tar", "-C", built, "."], check=True)
    (tmp_path / "train.tar").symlink_to("store/train-01.tar")
    (tmp_path / "project/workflow/scripts").mkdir(parents=True)
    (tmp_path / "project/workflow/scripts/train.py").write_text("print('here')")
    node = tmp_path / "node/deepseek-sft-0"

    def call(archive=tmp_path / "train.tar", path=None, start=subprocess.run):
        command = ["bash", project / "workflow/scripts/local_copies.sh", archive, node / "train-01"]
        command += [tmp_path / "project", node / "code-02"]
        environment = os.environ | ({"PATH": path} if path else {})
        if start is subprocess.Popen:
            return start(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return start(command, env=environment, capture_output=True, text=True, check=False)

    call.folder, call.node, call.built = tmp_path, node, built
    return call


def test_both_are_there_afterwards_and_are_taken_as_they_are_the_next_time(site):
    done = site()
    assert done.returncode == 0, done.stderr
    assert (site.node / "train-01/lib.py").read_text() == "content"
    (site.node / "train-01/lib.py").write_text("kept")
    again = site()
    assert (again.returncode, again.stdout) == (0, "") and (site.node / "train-01/lib.py").read_text() == "kept"
    program = [site.node / "train-01/bin/python", site.node / "code-02/workflow/scripts/train.py"]
    assert subprocess.run(program, capture_output=True, text=True, check=True).stdout == "here\n"


def test_two_jobs_on_a_node_unpack_it_once(site):
    both = [site(start=subprocess.Popen) for _ in range(2)]
    said = [one.communicate() for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert sum("unpacked in" in out for out, _ in said) == 1


def test_what_a_kill_left_is_made_anew(site):
    (site.node / "train-01.part").mkdir(parents=True)
    (site.node / "train-01").mkdir()
    assert site().returncode == 0
    assert (site.node / "train-01/complete.json").exists() and not (site.node / "train-01.part").exists()


def test_a_cut_archive_leaves_nothing_and_names_the_node(site):
    cut = site.folder / "train-01.tar"
    cut.write_bytes((site.folder / "train.tar").read_bytes()[:1500])
    done = site(cut)
    assert (
        done.returncode == 2
        and f"error: {os.uname().nodename}: " in done.stderr
        and "could not be unpacked" in done.stderr
    )
    assert not (site.node / "train-01").exists() and not (site.node / "train-01.part").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.tar", "cannot be read"),
        ("train-01.zip", "neither .tar nor .squashfs"),
        ("train-02.tar", "another lock"),
    ],
)
def test_an_archive_that_is_none_is_refused(site, name, said):
    if name != "absent.tar":
        (site.folder / name).write_text("")
    done = site(site.folder / name)
    assert done.returncode == 2 and said in done.stderr


def test_a_squashfs_that_nothing_here_mounts_names_the_other_way(site):
    tools = site.folder / "tools"
    tools.mkdir()
    for name in ("bash", "mkdir", "flock", "hostname", "id", "readlink", "rm", "mv"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "mount").write_text("#!/bin/sh\nexit 32\n")
    (tools / "mount").chmod(0o755)
    (site.folder / "train-01.squashfs").write_text("")
    done = site(site.folder / "train-01.squashfs", path=str(tools))
    assert done.returncode == 2 and "envs.local.train: tar" in done.stderr


@pytest.mark.skipif(not shutil.which("mksquashfs"), reason="needs squashfs-tools")
def test_a_squashfs_is_mounted_or_unpacked(site):
    packed = site.folder / "train-01.squashfs"
    subprocess.run(["mksquashfs", site.built, packed, "-quiet", "-no-progress"], check=True, capture_output=True)
    try:
        done = site(packed)
        assert done.returncode == 0 and (site.node / "train-01/lib.py").read_text() == "content", done.stderr
    finally:
        subprocess.run(["umount", site.node / "train-01"], capture_output=True, check=False)


def test_another_users_folder_is_not_used(site, monkeypatch):
    site.node.parent.mkdir()
    site.node.write_text("a file in its place")
    done = site()
    assert done.returncode == 2 and "envs.local.folder" in done.stderr


def test_the_copy_is_named_by_its_content(tmp_path):
    (tmp_path / "a.py").write_text("1")
    first = local_copies.code_hash(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__/a.pyc").write_text("2")
    assert local_copies.code_hash(tmp_path) == first
    (tmp_path / "a.py").write_text("3")
    assert local_copies.code_hash(tmp_path) != first


def experiment(**envs):
    demo = {"experiment": "x", "accelerator": "cpu", "data": {"sources": ["a"]}, "model": {"tiny": {}}}
    return Experiment.from_config(demo | {"train": {"ranks_per_node": 4}, "envs": envs, "plan": {}})


def test_training_alone_runs_from_there():
    chosen = experiment(local={"train": "tar", "folder": "/scratch/"})
    assert chosen.environment("train").python.startswith(f"/scratch/deepseek-sft-{os.getuid()}/train-")
    assert chosen.environment("serve").python == ".envs/serve-cpu/bin/python"
    for rule in ("train", "preflight", "rehearse"):
        assert "--archive .envs/train.tar" in chosen.render_arguments(rule)
    assert "--archive" not in chosen.render_arguments("smoke_test") + experiment().render_arguments("train")


def test_an_environment_of_ones_own_is_not_copied():
    with pytest.raises(BadInputError, match=r"envs\.local\.train: copies the locked environment"):
        experiment(local={"train": "tar"}, train={"python": "/opt/bin/python"})


def test_where_it_runs_shapes_nothing():
    at_home, local = experiment(), experiment(local={"train": "tar"})
    for rule in ("train", "preflight", "plan", "rehearse"):
        assert at_home.settings(rule) == local.settings(rule)
    assert field_types.keys(Local)["train"].default is None
