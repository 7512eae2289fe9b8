"""The builder of environments: names, hashes and locks."""

import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT / "workflow/scripts"))

import build_env  # noqa: E402

from deepseek_sft import locks  # noqa: E402
from deepseek_sft.errors import CrashError  # noqa: E402

LOCKS = ["workflow", "dev", "train", "train-cuda", "serve-cpu", "serve-cuda", "evaluate", "track"]
HASHED = sorted(path.stem for path in (PROJECT / "envs").glob("*.txt"))


def requirements(name: str) -> dict[str, str]:
    lines = (PROJECT / "envs" / f"{name}.txt").read_text().splitlines()
    pairs = (line.removesuffix(" \\").split("==") for line in lines if line[:1].isalnum())
    return dict(pairs)


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_of_a_lock_is_pinned_to_one_version(name):
    for package, version in requirements(name).items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", package)
        assert re.fullmatch(r"[0-9][A-Za-z0-9.!]*", version.removesuffix("+cpu")), f"{package}=={version}"


def test_torch_is_the_same_version_everywhere_its_cpu_build_on_cpu():
    found = {name: requirements(name)["torch"] for name in ("train", "train-cuda", "serve-cpu", "serve-cuda")}
    cpu, cuda = "2.13.0+cpu", "2.13.0"
    assert found == {"train": cpu, "train-cuda": cuda, "serve-cpu": cpu, "serve-cuda": cuda}


@pytest.mark.parametrize("name", HASHED)
def test_every_package_of_a_lock_has_a_hash(name):
    blocks = re.split(r"\n(?=[A-Za-z0-9])", (PROJECT / "envs" / f"{name}.txt").read_text())
    packages = [block for block in blocks if "==" in block]
    assert packages and all("--hash=sha256:" in block for block in packages)


def test_train_cuda_is_train_with_the_cuda_half_alone_added():
    cpu, cuda = requirements("train"), requirements("train-cuda")
    assert {name: cuda[name] for name in cpu} == {name: value.removesuffix("+cpu") for name, value in cpu.items()}
    added = cuda.keys() - cpu.keys()
    assert all(name == "triton" or name.startswith(("nvidia-", "cuda-")) for name in added)
    assert {"triton", "nvidia-nccl-cu13", "nvidia-cudnn-cu13"} <= added


def test_wheel_that_is_not_the_locked_one_is_refused(small, monkeypatch):
    monkeypatch.setattr(build_env, "find_uv", lambda: None)
    lock = f"first==1.0 \\\n    --hash=sha256:{'0' * 64}\n"
    (small / "envs/small.txt").write_text(lock)
    (small / "wheels/small.txt").write_text(lock)
    with pytest.raises(CrashError, match="--require-hashes"):
        build_env.build("small", small / "store", small / "wheels")


@pytest.mark.parametrize("name", LOCKS)
@pytest.mark.parametrize("installer", ["pip", "uv", "wheelhouse", "download"])
def test_nothing_is_installed_or_collected_without_its_hash(tmp_path, monkeypatch, name, installer):
    commands = []
    monkeypatch.setattr(build_env, "run", lambda command, *_: commands.append([str(word) for word in command]))
    monkeypatch.setattr(build_env, "find_uv", lambda: "/bin/uv" if installer == "uv" else None)
    (tmp_path / "bin").mkdir()
    if installer == "download":
        build_env.download(name, tmp_path / "wheels")
    else:
        build_env.install(tmp_path, name, tmp_path if installer == "wheelhouse" else None)
    from_locks = [command for command in commands if "-r" in command]
    assert len(from_locks) == len(build_env.requirement_files(name))
    assert all("--require-hashes" in command for command in from_locks)


def test_wheels_that_were_built_for_a_wheelhouse_have_their_hash_beside_the_lock_s(small):
    lock = small / "envs/small.txt"
    lock.write_text(f"first==1.0 \\\n    --hash=sha256:{'0' * 64}\nsecond==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    (small / "wheels/small.txt").write_text(build_env.with_wheels(lock, small / "wheels"))
    folder = build_env.build("small", small / "store", small / "wheels")
    assert (folder / "complete.json").exists()


def test_dev_holds_the_workflow_environment_unchanged():
    workflow, dev = requirements("workflow"), requirements("dev")
    assert {name: dev[name] for name in workflow} == workflow


def test_no_lock_names_an_index_or_a_path():
    for path in (PROJECT / "envs").glob("*.txt"):
        assert "://" not in path.read_text()
        assert "--find-links" not in path.read_text()


def test_hash_follows_the_lock_and_the_shim(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "FOLDER", tmp_path)
    (tmp_path / "x.txt").write_text("a==1\n")
    hashes = [locks.lock_hash("x")]
    (tmp_path / "x.no-deps.txt").write_text("b==1\n")
    hashes.append(locks.lock_hash("x"))
    (tmp_path / "shims/x").mkdir(parents=True)
    (tmp_path / "shims/x/pyproject.toml").write_text("[project]")
    hashes.append(locks.lock_hash("x"))
    assert len(set(hashes)) == 3
    assert locks.lock_hash("x") == hashes[-1]


def test_unknown_environment_is_named_with_the_known_ones():
    program = PROJECT / "workflow/scripts/build_env.py"
    done = subprocess.run([sys.executable, program, "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no environment is named trian" in done.stderr
    assert "serve-cpu" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupted_build_is_started_again(tmp_path, monkeypatch):
    def install(folder, name, wheelhouse):
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(build_env, "install", install)
    with pytest.raises(KeyboardInterrupt):
        build_env.build("train", tmp_path, None)
    built = []

    def install_well(folder, name, wheelhouse):
        assert not folder.exists()
        folder.mkdir()
        built.append(name)

    monkeypatch.setattr(build_env, "install", install_well)
    folder = build_env.build("train", tmp_path, None)
    build_env.build("train", tmp_path, None)
    assert built == ["train"]
    assert (folder / "complete.json").exists()


def test_linked_environment_of_the_present_lock_is_used_whatever_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(build_env, "PROJECT", tmp_path)
    present = tmp_path / "elsewhere" / f"train-{locks.lock_hash('train')}"
    present.mkdir(parents=True)
    build_env.link("train", present)
    assert build_env.linked("train") is None  # not complete
    (present / "complete.json").touch()
    assert build_env.linked("train") == present
    monkeypatch.setattr(locks, "BUILDER", "another")
    assert build_env.linked("train") is None  # of another lock


def wheel(folder: Path, name: str, *needs: str) -> None:
    """A package of one module that holds its name."""
    folder.mkdir(exist_ok=True)
    about = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n" + "".join(f"Requires-Dist: {n}\n" for n in needs)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", f"NAME = '{name}'\n")
        file.writestr(f"{about}/METADATA", metadata)
        file.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{about}/RECORD", "")


def locked(index: Path, *names: str) -> str:
    """Lines of a lock with the packages' hashes."""
    sums = {name: hashlib.sha256((index / f"{name}-1.0-py3-none-any.whl").read_bytes()).hexdigest() for name in names}
    return "".join(f"{name}==1.0 \\\n    --hash=sha256:{value}\n" for name, value in sums.items())


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small environment with both files of a lock, whose packages an index has that goes away."""
    index = tmp_path / "index"
    wheel(index, "first", "second")
    wheel(index, "second")
    wheel(index, "third", "package-that-no-index-has")
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs/small.txt").write_text(locked(index, "first", "second"))
    (tmp_path / "envs/small.no-deps.txt").write_text(locked(index, "third"))
    monkeypatch.setattr(locks, "FOLDER", tmp_path / "envs")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    build_env.download("small", tmp_path / "wheels")
    for file in index.iterdir():
        file.unlink()
    return tmp_path


def test_air_gapped_install_needs_what_one_command_collected_and_nothing_else(small):
    folder = build_env.build("small", small / "store", small / "wheels")
    code = "import first, second, third; print(first.NAME, second.NAME, third.NAME)"
    done = subprocess.run([folder / "bin/python", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["first", "second", "third"]


def test_incomplete_wheelhouse_is_told_as_such(small):
    (small / "wheels/third-1.0-py3-none-any.whl").unlink()
    with pytest.raises(CrashError) as raised:
        build_env.build("small", small / "store", small / "wheels")
    assert f"packages come from {small / 'wheels'} alone" in raised.value.fix
    assert f"--download {small / 'wheels'} small" in raised.value.fix
    assert "indexes" not in raised.value.fix


def test_wheelhouse_that_does_not_exist_is_bad_input(tmp_path):
    program = PROJECT / "workflow/scripts/build_env.py"
    command = [sys.executable, program, "train", "--wheelhouse", tmp_path / "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--download" in done.stderr and "Traceback" not in done.stderr
