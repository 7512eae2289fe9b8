"""What a beginner types wrong, typed for real: one answer of at most ten lines that says what to do. About a minute."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from finished_chain import Chain

SCRIPTS = ("build_report", "tokenize_data", "prepare_data", "train", "status", "plan", "clean", "smoke_test")


@pytest.fixture(scope="module")
def chain(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A clone; tests change nothing but files of their own."""
    return Chain(project, tmp_path_factory.mktemp("beginner"))


def overlay(chain: Chain, name: str, **content: object) -> str:
    """A configuration file of that name."""
    (chain.clone / name).write_text(yaml.safe_dump(content))
    return name


def answer_of(said: str) -> list[str]:
    """Lines from `error:` on, without those that Snakemake prints before."""
    lines = said.rstrip().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(("error: ", "failed: ")))
    return lines[start:]


def test_failed_stage_ends_with_ten_lines_and_a_report_of_what_there_is(chain):
    (chain.clone / "broken.jsonl").write_text("no JSON\n")
    config = overlay(chain, "failing.yaml", experiment="failing", data={"sources": ["broken.jsonl"]})
    code, said = chain.snakemake("report", config=(config,))
    assert code == 1
    end = said[said.rindex("failed: ") :].splitlines()
    assert end[0] == "failed: prepare_data (exit code 2)"
    assert "none of 1 records was accepted" in end[1]
    assert len(end) <= 10
    assert end[-1].startswith("  next:   after that the same again: snakemake report --profile profiles/local")
    assert "Traceback" not in said
    assert "At least one job did not complete" not in said
    assert said.count("none of 1 records was accepted") <= 2  # of the stage as it ran, and at the end
    results = chain.clone / "results/failing"
    assert (results / "report.html").exists()
    assert not (results / "receipts/build_report.json").exists()


def test_stage_that_went_well_ends_with_what_is_still_open(chain):
    record = {"messages": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]}
    (chain.clone / "good.jsonl").write_text(json.dumps(record) + "\n")
    config = overlay(chain, "going.yaml", experiment="going", data={"sources": ["good.jsonl"]})
    code, said = chain.snakemake("results/going/receipts/prepare_data.json", config=(config,))
    assert code == 0, said
    last = said.rstrip().splitlines()[-2:]
    assert last[0].startswith("done: going, prepare_data in")
    assert last[1].startswith("  not yet: tokenize_data, plan, prepare_model, refine_plan, train")


def test_dry_run_of_the_published_run_is_short_with_its_warnings_last(chain):
    code, said = chain.snakemake("-n", config=(), profile="slurm")
    assert code == 0, said
    lines = said.rstrip().splitlines()
    assert len(lines) < 40
    assert lines[-1].startswith("warning: model.base: models/DeepSeek-R1 does not exist")
    assert max(map(len, lines)) < 300


def test_configuration_without_a_name_does_not_go_on_as_the_demo(chain):
    config = overlay(chain, "nameless.yaml", train={"max_steps": 3})
    code, said = chain.snakemake("plan", config=(config,))
    assert code == 1
    answer = answer_of(said)
    assert "nameless.yaml names no experiment: it would go on as `demo`" in answer[0]
    assert "write `experiment: nameless` into it" in "\n".join(answer)
    assert len(answer) <= 10
    assert not (chain.clone / "results/demo").exists()
    code, said = chain.snakemake("-n", "plan", config=(config,))
    assert code == 0
    assert "would be refused: nameless.yaml names no experiment" in said


def test_data_that_nodes_do_not_see_are_refused_with_host_and_place(chain, tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    config = overlay(chain, "elsewhere.yaml", experiment="elsewhere", data={"sources": [str(tmp_path / "mine.jsonl")]})
    code, said = chain.snakemake("-n", "data", config=(config,), profile="demo")
    assert code == 1
    answer = answer_of(said)
    assert "nodes would not see what is here on" in answer[0]
    assert f"data.sources[0]: {tmp_path}/mine.jsonl lies in /tmp" in answer[1]
    assert f"such as {chain.clone}" in answer[2]
    assert len(answer) <= 10
    code, said = chain.snakemake("-n", "data", config=(config,))
    assert code == 0, said  # this machine alone reads them


def test_slurm_that_does_not_answer_is_one_message_before_any_job(chain, monkeypatch, tmp_path):
    for name in ("sinfo", "sbatch"):
        program = tmp_path / name
        program.write_text(
            "#!/bin/sh\necho 'error: Unable to contact slurm controller (connect failure)' >&2\nexit 1\n"
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (chain.clone / "chats.jsonl").write_text("{}\n")
    config = overlay(chain, "unreachable.yaml", experiment="unreachable", data={"sources": ["chats.jsonl"]})
    code, said = chain.snakemake("data", config=(config,), profile="demo")
    assert code == 1
    answer = answer_of(said)
    assert "Unable to contact slurm controller" in answer[0]
    assert "cluster/run --nodes 4" in answer[1]
    assert len(answer) <= 10
    assert "submitted" not in said


def test_shape_of_serving_blocks_no_plan_and_speaks_with_a_fix_where_it_matters(chain):
    serve = {"tensor_parallel_size": 8, "pipeline_parallel_size": 4}
    gpus = {"accelerator": "cuda", "train": {"ranks_per_node": None}}
    config = overlay(chain, "site.yaml", experiment="site", serve=serve, **gpus)
    profile = yaml.safe_load((chain.clone / "profiles/demo/config.yaml").read_text())
    profile["set-resources"]["smoke_test"] |= {"nodes": 4, "gres": "gpu:4"}
    profile["set-resources"]["train"] |= {"gres": "gpu:4"}
    folder = chain.clone / "profiles/site"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(profile))
    for target in ("plan", "data", "model"):
        code, said = chain.snakemake("-n", target, config=(config,), profile="site")
        assert code == 0, said
    code, said = chain.snakemake("-n", config=(config,), profile="site")
    assert code == 1
    answer = answer_of(said)
    assert "needs 8 GPUs on each of 4 nodes, and the profile gives 4" in said
    assert "fix: set-resources: smoke_test: nodes: 8 in the profile with tensor_parallel_size 4" in said
    assert len(answer) <= 10


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-n", "--profile", "profiles/local", "--configfile", "bad.yaml"], "bad.yaml, line 3, column 1"),
        (["--profile", "profiles/local", "--configfile", "mine.yaml", "data"], "put the target first: snakemake data"),
        (["--configfile", "mine.yaml"], "add --profile profiles/slurm"),
        (["--profile", "profiles/slrum"], "did you mean profiles/slurm?"),
    ],
)
def test_mistake_on_the_command_line_is_answered_by_snakemake_as_installed(chain, words, expected):
    (chain.clone / "bad.yaml").write_text("experiment: bad\ndata:\n\tsources: []\n")
    code, said = chain.run([".envs/workflow/bin/snakemake", *words])
    assert code == 2
    assert expected in said
    assert len(said.splitlines()) <= 10


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_started_with_another_python_says_which_to_use(project, script):
    bare = [sys.executable, "-S", f"workflow/scripts/{script}.py", "--help"]  # without site-packages
    done = subprocess.run(bare, cwd=project, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    if script not in ("prepare_data", "clean"):  # the standard library is enough for their help
        assert done.returncode == 2, said
        assert re.search(r"error: this Python, .* has no \w+\n  fix: use the project's own: source \.envs/", said)
        assert len(said.splitlines()) <= 10
