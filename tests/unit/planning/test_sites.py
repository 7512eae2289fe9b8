"""Plans for sites that fall short or differ: every limit, what the site can do about it, lines that can be pasted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import planning_models as models
import pytest
import yaml

from deepseek_sft import config as configuration
from deepseek_sft.errors import BadInputError
from deepseek_sft.planning import advice, gpu_models, load, plan_text, remedies
from deepseek_sft.planning.training_resources import read_resources
from deepseek_sft.settings import field_types
from deepseek_sft.settings.plan import Plan
from deepseek_sft.site import questions
from deepseek_sft.slurm.sbatch import Allocation

PROJECT = Path(__file__).resolve().parents[3]
A100_SITE = {  # 16 nodes of 4 A100, 480 GB, a day at most
    "nodes": 16,
    "gres": "gpu:a100:4",
    "mem_mb": 480_000,
    "runtime": 1440,
    "slurm_extra": "--signal=USR1@900 --exclusive --constraint=ib",
}
H200_SITE = {"nodes": 16, "gres": "gpu:h200:8", "mem_mb": 1_900_000, "runtime": 5760}


def planned(resources: dict, model: str = "deepseek-r1", **sections):
    """A plan of the default experiment on this site."""
    plan = {"samples": 100_000, "mean_length": 8000, "storage_tb": 100} | sections.pop("plan", {})
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    overlay = sections | {"plan": plan, "model": {"base": str(load.SHAPES / model)}}
    resolved = configuration.resolve(configuration.merge(config, overlay))
    return load.from_config(resolved, read_resources(resources))


@pytest.fixture
def script(tmp_path):
    """plan.py as a person runs it who has downloaded nothing."""

    def run(resources: dict, overlay: dict, *arguments: str) -> subprocess.CompletedProcess:
        (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
        files = [str(PROJECT / "config/config.yaml"), str(tmp_path / "overlay.yaml")]
        command = [sys.executable, str(PROJECT / "workflow/scripts/plan.py"), "--config", *files]
        command += ["--resources", json.dumps(resources), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def test_small_site_is_told_every_limit_that_it_exceeds_the_worst_first(script):
    overlay = {"plan": {"gpu": "a100-80gb", "storage_tb": 20, "node_memory_gib": 500}}
    done = script(A100_SITE, overlay, "--model", "deepseek-r1")
    assert done.returncode == 3
    for text in (done.stdout, done.stderr):
        memory, disk = text.index("host memory per node 962.01 GiB of 468.75 GiB (205%)"), text.index("disk 24.41 TiB")
        assert memory < disk
    assert "mem_mb" not in done.stdout + done.stderr  # no node has so much
    assert "nearest that fits: profile, train: nodes: 34" in done.stderr
    assert "train.keep_checkpoints: 1 fits the disk" in done.stderr


def test_large_site_fits_without_a_word_of_what_falls_short(script):
    overlay = {"plan": {"gpu": "h200", "storage_tb": 100}, "train": {"gradient_accumulation_dtype": "bfloat16"}}
    done = script(H200_SITE, overlay, "--model", "deepseek-v3")
    assert done.returncode == 0, done.stderr
    assert "verdict: fits" in done.stdout
    assert "write into the profile" not in done.stdout and "nearest" not in done.stdout


@pytest.mark.parametrize("node_gib", [None, 1100])
def test_memory_is_asked_for_where_the_node_may_have_it(node_gib):
    plan = planned(A100_SITE, plan={"node_memory_gib": node_gib})
    found = remedies.remedies(plan)
    assert found[0].settings == {"mem_mb": plan.host_mb}
    assert any(line.startswith("mem_mb: ") for line in advice.profile_lines(plan))


def test_search_covers_what_the_nodes_can_do_without_more_of_anything():
    site = A100_SITE | {"mem_mb": 950_000}
    found = remedies.remedies(planned(site, plan={"node_memory_gib": 1000}))
    kinds = [set(one.settings) for one in found]
    assert kinds == [{"offload"}, {"gradient_accumulation_dtype"}, {"nodes"}]
    for one in found:
        assert remedies.suffices(one.plan)


def test_every_remedy_keeps_the_samples_of_a_step():
    plan = planned(A100_SITE | {"mem_mb": 1_900_000}, plan={"gpu": "a100-40gb", "longest_row": 32768})
    found = remedies.remedies(planned(A100_SITE | {"mem_mb": 1_900_000}, plan={"gpu_memory_gib": 28}))
    assert found and plan.duration.global_batch
    for one in found:
        if "nodes" not in one.settings:
            assert one.plan.duration.global_batch == plan.duration.global_batch


def test_lines_for_the_profile_can_be_pasted_and_keep_its_options(script):
    done = script(A100_SITE, {"plan": {"gpu": "a100-80gb", "samples": 1000}}, "--model", "deepseek-r1")
    block = done.stdout.split("write into the profile:\n")[1].split("\n\n")[0]
    train = yaml.safe_load(block)["set-resources"]["train"]
    assert train["mem_mb"] > 1_000_000
    words = train["slurm_extra"].split()
    assert words[1:] == ["--exclusive", "--constraint=ib"]
    Allocation(runtime=1440, extra=train["slurm_extra"])
    again = planned(A100_SITE | train, plan={"gpu": "a100-80gb", "samples": 1000})
    assert advice.profile_lines(again) == []


def test_words_with_quotes_survive_the_profile():
    extra = "--signal=USR1@9 --comment='a \"b\" \\c'"
    plan = planned(H200_SITE | {"slurm_extra": extra})
    (line,) = [line for line in advice.profile_lines(plan) if line.startswith("slurm_extra")]
    assert yaml.safe_load(line)["slurm_extra"].split(" ", 1)[1] == extra.split(" ", 1)[1]


def test_type_in_the_profile_that_contradicts_the_plans_numbers_is_noted():
    def contradictions(resources: dict, **plan) -> list[str]:
        return [note for note in advice.notes(planned(resources, plan=plan)) if "the profile asks for `" in note]

    (note,) = contradictions(A100_SITE)
    assert "989 TFLOP/s" in note and "plan: {gpu: a100-40gb or a100-80gb}" in note
    assert contradictions(A100_SITE, gpu="a100-80gb") == []
    assert contradictions(A100_SITE, gpu_tflops=290) == []
    assert contradictions(H200_SITE | {"gres": "gpu:8"}) == []
    assert contradictions(H200_SITE, gpu="b200")
    assert contradictions({"nodes": 4, "gres": "gpu:8", "slurm_extra": "--constraint=a100"})


def test_gpu_by_name_stands_for_its_numbers_and_explicit_ones_win():
    def numbers(**plan) -> tuple[float, float]:
        config = {"experiment": "x", "data": {"sources": ["a"]}, "model": {"base": "b"}, "plan": plan}
        found = configuration.resolve(config)["plan"]
        return found["gpu_tflops"], found["gpu_memory_gib"]

    assert numbers() == (989, 79.1)
    assert numbers(gpu="b200") == (2250, 178.3)
    assert numbers(gpu="a100-40gb", gpu_tflops=280) == (280, 39.4)
    with pytest.raises(BadInputError, match="h100, h800"):
        numbers(gpu="h1000")


def test_every_named_gpu_is_in_the_schema_and_the_documentation():
    assert field_types.keys(Plan)["gpu"].choices == (*gpu_models.GPUS, None)
    page = (PROJECT / "docs/planning.md").read_text()
    for name, gpu in gpu_models.GPUS.items():
        assert f"| `{name}` | {gpu.memory_gib:g} | {gpu.tflops:,} | {gpu.memory_tb_per_second:g} |" in page


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("gpu:a100:4", ["a100-40gb", "a100-80gb"]),
        ("gpu:nvidia_a100_sxm4_80gb:4", ["a100-80gb"]),
        ("gpu:H100:8", ["h100"]),
        ("gpu:h200:8", ["h200"]),
        ("gpu:8", []),
    ],
)
def test_gpus_are_recognised_in_the_profiles_words(words, names):
    assert gpu_models.named_in(words) == names


@pytest.mark.parametrize(
    ("gpu", "mean_length", "kernel"),
    [
        ("a100-80gb", 8000, "torch varlen, padded values"),
        ("h100", 8000, "sdpa, unpadded"),
        ("h200", 1000, "torch varlen, padded values"),
        ("b200", 8000, "torch varlen, padded values"),
    ],
)
def test_plan_names_the_attention_kernel_that_training_will_choose(gpu, mean_length, kernel):
    plan = planned(H200_SITE, plan={"gpu": gpu, "mean_length": mean_length}, data={"pack": True})
    assert f"attention by {kernel} (train.attention: auto)" in plan_text.text(plan)


def test_fp8_is_noted_where_a_gpu_has_no_arithmetic_for_it():
    def notes(gpu: str, dtype: str) -> list[str]:
        return [
            note
            for note in advice.notes(planned(A100_SITE, plan={"gpu": gpu}, convert={"dtype": dtype}))
            if "Marlin" in note
        ]

    assert len(notes("a100-80gb", "fp8")) == 1
    assert notes("a100-80gb", "bf16") == notes("h100", "fp8") == []


def test_time_limited_partition_is_told_the_number_of_starts():
    half = planned(A100_SITE | {"runtime": 720}, plan={"gpu": "a100-80gb", "samples": 400_000})
    (note,) = [note for note in advice.notes(half) if "starts" in note]
    assert "with 12 h 0 min a job (runtime) the run takes" in note
    assert "then the same command goes on" in note
    long = planned(A100_SITE | {"runtime": 60 * 24 * 30}, plan={"gpu": "a100-80gb"})
    assert not [note for note in advice.notes(long) if "starts" in note]
    short = planned(A100_SITE | {"runtime": 10, "slurm_extra": ""}, plan={"gpu": "a100-80gb"})
    assert [note for note in advice.notes(short) if "no time for a step" in note]


def test_shipped_shapes_are_those_of_the_public_models():
    def shape(name: str) -> dict:
        return json.loads((load.SHAPES / name / "config.json").read_text())

    assert shape("deepseek-v3") == shape("deepseek-r1") == models.DEEPSEEK_V3
    assert shape("moonlight-16b-a3b") == models.MOONLIGHT_16B
    assert sorted(filter(None, field_types.keys(Plan)["model"].choices)) == load.shapes()


def test_named_model_stands_for_a_base_that_is_not_there_and_only_then(tmp_path):
    def total(base: Path) -> int:
        config = {"experiment": "x", "data": {"sources": ["a"]}, "model": {"base": str(base)}}
        return load.model_of(configuration.resolve(config | {"plan": {"model": "deepseek-r1"}})).total

    assert total(tmp_path / "absent") == 671_026_419_200
    (tmp_path / "config.json").write_text(json.dumps(models.MOONLIGHT_16B))
    assert total(tmp_path) < 20e9


def test_too_few_gpus_for_the_sequence_groups_are_bad_input(script):
    done = script({"nodes": 1, "gres": "gpu:2"}, {"plan": {"samples": 9}}, "--model", "moonlight-16b-a3b")
    assert done.returncode == 2
    assert "does not divide the 2 ranks" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def sinfo(tmp_path, monkeypatch):
    """A cluster of two nodes with 480 GB and one with 960."""
    program = tmp_path / "bin/sinfo"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf 'n1 480000\\nn1 480000\\nn2 480000\\nn3 960000\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_memory_of_nodes_is_what_that_many_have(sinfo):
    assert [questions.node_memory_mb("gpu", nodes) for nodes in (1, 2, 3, 4)] == [960_000, 480_000, 480_000, None]


def test_plan_asks_slurm_for_the_memory_of_the_partition(sinfo, script):
    done = script(
        A100_SITE | {"nodes": 2}, {"plan": {"storage_tb": 100}}, "--model", "deepseek-r1", "--partition", "gpu"
    )
    assert done.returncode == 3 and "mem_mb" not in done.stderr


def test_fewest_nodes_are_told_where_the_disk_is_too_small_as_well(script):
    site = {"nodes": 1, "gres": "gpu:h100:8", "mem_mb": 1_900_000}
    for storage, code in (("100", 0), ("1", 3)):
        done = script(site, {}, "--model", "deepseek-r1", "--fit", "--storage-tb", storage)
        assert done.returncode == code
        assert "fewest nodes: 9" in done.stderr
