"""A tiny base of each family through the whole chain on this machine, without Slurm: `make families`.

Data in the base's own chat template, real DeepSpeed, conversion, verification, vLLM on CPU with its checks. Figures go
to docs/serving.md.
"""

import json
import os
import subprocess
from pathlib import Path

import family_models
import pytest
import yaml
from project_copy import copy_of

pytestmark = [pytest.mark.stage("train"), pytest.mark.stage("serve-cpu")]
FIGURES = Path("families.jsonl")
DEADLINE_S = 3600  # only a hang reaches it
CHECKS = {  # of the smoke test; what must have been judged, and passed
    *("health", "chat", "finish_reason", "repeatable", "streaming", "held_out_format", "no_template_tokens"),
    *("prompt_as_trained", "logprobs", "held_out_loss", "loss_drop", "weights_as_trained"),
}
STAGES = ("tokenize_data", "train", "convert_checkpoint", "verify_model", "smoke_test")


def texts(project: Path) -> tuple[str, ...]:
    """What the demo's chats say, for a vocabulary that has its words."""
    return ((project / "resources" / "demo" / "chats.jsonl").read_text(encoding="utf-8"),)


def chats(clone: Path, kind: family_models.Kind) -> tuple[str, str]:
    """The demo's chats and held-out samples, without reasoning where the family's template writes none."""
    names = ("chats.jsonl", "held_out.jsonl")
    for name in names:
        records = [json.loads(line) for line in (clone / "resources/demo" / name).read_text().splitlines()]
        for message in (message for record in records for message in record["messages"] if not kind.reasons):
            message.pop("reasoning_content", None)
        (clone / name).write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return names


def experiment(name: str, base: Path, serve: dict, sources: tuple[str, str]) -> dict:
    """The demo with another base: fewer steps do, as its vocabulary is small."""
    return {
        "experiment": name,
        "data": {"template": "base", "sources": [sources[0]]},
        "model": {"tiny": None, "base": str(base)},
        "train": {"sequence_parallel_size": 1, "max_steps": 120, "save_every_steps": 60, "micro_batch_size": 8},
        "serve": {"pipeline_parallel_size": 1, "served_model_name": name, "reasoning_parser": "auto", **serve},
        "smoke_test": {"prompts": sources[1], "min_exact_match_rate": None, "max_loss": 2, "min_loss_drop": 3},
    }


@pytest.mark.parametrize("name", family_models.KINDS)
def test_a_tiny_base_of_the_family_goes_through_the_whole_chain(name: str, project: Path, tmp_path: Path) -> None:
    kind = family_models.KINDS[name]
    clone = copy_of(project, tmp_path)
    (clone / ".envs").symlink_to(project / ".envs")
    base = family_models.write(tmp_path / "base", kind, texts(project))
    overlay = clone / f"{name}.yaml"
    overlay.write_text(yaml.safe_dump(experiment(name, base, dict(kind.serve), chats(clone, kind))))
    command = [".envs/workflow/bin/snakemake", "--profile", "profiles/local", "--configfile"]
    command += ["config/experiments/demo.yaml", overlay.name]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=clone, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    receipts = {rule: json.loads((clone / f"results/{name}/receipts/{rule}.json").read_text()) for rule in STAGES}
    tested = receipts["smoke_test"]["figures"]
    checks = tested["checks"]
    expected = (
        CHECKS
        | ({"tool_calls"} if "tool_call_parser" in kind.serve else set())
        | ({"reasoning_separate"} if kind.reasons else set())
    )
    assert set(checks) >= expected, sorted(expected - set(checks))
    figures = {
        "family": kind.row.name,
        "samples": receipts["tokenize_data"]["figures"]["samples"],
        "seconds": {rule: round(receipt["seconds"]) for rule, receipt in receipts.items()},
        "checks": {check: checks[check]["detail"] for check in sorted(expected)},
        "format_rate": tested["format_rate"],
        "exact_match_rate": tested["exact_match_rate"],
    }
    with (project / FIGURES).open("a") as stream:
        stream.write(json.dumps(figures) + "\n")
    print(json.dumps(figures, indent=1))
