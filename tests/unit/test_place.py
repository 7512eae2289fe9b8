"""A run is refused in a sentence where its folders cannot be used."""

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from deepseek_sft import place, starting
from deepseek_sft.errors import BadInputError
from deepseek_sft.slurm import nodes


@pytest.mark.parametrize("results", ["results", "/scratch/a.b-c_d/é", "../x", "/lustre/project@site/run=1"])
def test_plain_path_of_results_is_taken(results):
    place.check_results(results)


@pytest.mark.parametrize("results", ["my results", "a;b", "a{b}", "$SCRATCH/x", "~/results", "a*", "'a'", "a\nb", "-x"])
def test_path_that_a_shell_would_read_otherwise_is_refused(results):
    with pytest.raises(BadInputError, match="results: "):
        place.check_results(results)


def as_nobody(folder: Path, *command: str) -> subprocess.CompletedProcess:
    become = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
    return subprocess.run([*become, *command], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def shared() -> Path:
    """A folder that another user may enter; root only, who alone can become another user."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_folder_of_another_user_is_named_with_its_owner_and_two_ways_out(shared, project):
    (shared / "results").mkdir()
    code = "\n".join(
        [
            "import sys",
            "sys.path.insert(0, sys.argv[1])",
            "from deepseek_sft import errors, place",
            "try:",
            "    place.check_writable('results/demo', 'logs/demo')",
            "except errors.BadInputError as error:",
            "    print(error)",
        ]
    )
    # The package alone, where the other user can read it, and an interpreter that he can start.
    package = shared / "package" / "deepseek_sft"
    package.mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "place.py"):
        (package / name).write_text((project / "workflow/deepseek_sft" / name).read_text())
    python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
    said = as_nobody(shared, python, "-c", code, str(shared / "package")).stdout
    assert f"belongs to root, and {pwd.getpwnam('nobody').pw_name} may not write there" in said
    assert "clone of your own" in said
    assert "umask 002" in said
    for folder in (shared, shared / "results"):
        folder.chmod(0o777)
    assert as_nobody(shared, python, "-c", code, str(shared / "package")).stdout == ""


def test_read_only_checkout_is_refused_as_such(shared, project):
    checkout = shared / "checkout"
    checkout.mkdir()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from deepseek_sft import place; place.check_writable('results/x')"
    )
    words = [sys.executable, "-c", code, str(project / "workflow")]
    mount = f'mount --bind {checkout} {checkout} && mount -o remount,ro,bind {checkout} && cd {checkout} && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, "sh", *words], capture_output=True, text=True, check=False
    )
    assert f"{checkout} lies on a file system that is read-only here" in done.stderr, done.stderr
    assert "work in a clone of your own" in done.stderr


def test_start_in_another_folder_than_the_projects_is_refused(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "project")
    monkeypatch.chdir(tmp_path / "link")
    place.check_folder(tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInputError, match=f"snakemake works in {tmp_path}, but the project lies in") as refused:
        place.check_folder(tmp_path / "project")
    assert f"cd {tmp_path / 'project'}" in refused.value.fix


def test_results_behind_a_link_count_where_they_lie(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (tmp_path / "results").symlink_to(elsewhere)
        assert starting.node_local(tmp_path / "results/r1", tmp_path) == "/dev/shm"
    (tmp_path / "other").symlink_to("/mnt/scratch")
    assert starting.node_local(tmp_path / "other/r1", tmp_path) is None


def test_node_whose_name_does_not_resolve_is_found_by_its_address(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\necho "NodeName=$4 NodeAddr=127.0.0.7 NodeHostName=nowhere.invalid"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(nodes, "_resolves", lambda name: name in ("localhost", "127.0.0.7"))
    nodes.address_of.cache_clear()
    assert nodes.address_of("gpu-7") == "127.0.0.7"
    assert nodes.address_of("localhost") == "localhost"
    nodes.address_of.cache_clear()
