"""What of training's environment is found out on the machine that starts the workflow."""

from pathlib import Path

import pytest

from deepseek_sft import known_at_start
from deepseek_sft.errors import BadInputError
from deepseek_sft.experiment import Experiment
from deepseek_sft.preflight import software

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Wed Mar 12 00:00:00 UTC 2025\nGCC version: 12.2.0\n"


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch, tmp_path):
    monkeypatch.setattr(software, "_memory", lambda: tmp_path / "memory")


def experiment(tmp_path: Path, cuda: str | None = "13.0", script: str = "exit 0", **env: str) -> Experiment:
    """An experiment whose environment has this torch, and an interpreter that does this."""
    python = tmp_path / "env/bin/python"
    torch = tmp_path / "env/lib/python3.11/site-packages/torch"
    for folder in (python.parent, torch):
        folder.mkdir(parents=True, exist_ok=True)
    (torch / "version.py").write_text(f"cuda: Optional[str] = {cuda!r}\n")
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    own = {"python": str(python), "activate": ""} | env
    data = {"sources": ["x.jsonl"]}
    return Experiment.from_config({"experiment": "a", "data": data, "model": {"base": "b"}, "envs": {"train": own}})


def said(tmp_path: Path, version: str) -> Path:
    (tmp_path / "driver").write_text(DRIVER.format(version))
    return tmp_path / "driver"


def test_an_old_driver_of_this_machine_is_a_warning(tmp_path):
    (found,) = known_at_start.check_stack(experiment(tmp_path), driver=said(tmp_path, "550.54.15"))
    assert "needs driver 580 or newer; this is 550.54.15" in found
    assert known_at_start.check_stack(experiment(tmp_path), driver=said(tmp_path, "580.65.06")) == []
    assert known_at_start.check_stack(experiment(tmp_path), driver=tmp_path / "none") == []


def test_forward_compatibility_carries_an_old_driver(tmp_path):
    (tmp_path / "compat").mkdir()
    with pytest.raises(BadInputError, match=r"cuda_compat: .*compat holds no libcuda.so.1"):
        known_at_start.check_stack(experiment(tmp_path, cuda_compat=str(tmp_path / "compat")))
    (tmp_path / "compat/libcuda.so.580.65.06").touch()
    (tmp_path / "compat/libcuda.so.1").symlink_to("libcuda.so.580.65.06")
    chosen = experiment(tmp_path, cuda_compat=str(tmp_path / "compat"))
    assert known_at_start.check_stack(chosen, driver=said(tmp_path, "550.54.15")) == []


def test_a_missing_package_is_refused_before_nodes_are_asked_for(tmp_path):
    chosen = experiment(tmp_path, script="echo \"ModuleNotFoundError: No module named 'deepspeed'\" >&2; exit 1")
    with pytest.raises(BadInputError, match="No module named 'deepspeed'"):
        known_at_start.check_stack(chosen)
    assert known_at_start.check_stack(chosen, rules=["prepare_data"]) == []


def test_what_a_machine_without_gpus_cannot_import_is_a_warning(tmp_path):
    chosen = experiment(tmp_path, script="echo 'OSError: libcuda.so.1: cannot open shared object' >&2; exit 1")
    (found,) = known_at_start.check_stack(chosen, driver=tmp_path / "none")
    assert "libcuda.so.1" in found and "preflight tries it on the nodes" in found


def test_a_torch_for_cpus_is_refused_for_gpus(tmp_path):
    with pytest.raises(BadInputError, match="built for CPUs alone"):
        known_at_start.check_stack(experiment(tmp_path, cuda=None))
