"""What `render` shows is what would be submitted: golden files, and the plugin's own call of sbatch. About 40 s."""

import re
import shlex
from pathlib import Path

import pytest
from render_site import Site

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(scope="module")
def site(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(project, tmp_path_factory.mktemp("render"))
    profile = site.clone / "profiles/slurm/config.yaml"
    text = profile.read_text()
    assert "# slurm_account: my-project" in text
    profile.write_text(text.replace("# slurm_account: my-project", "slurm_account: project-7"))
    sources = "data: {sources: [resources/demo/chats.jsonl]}"
    (site.clone / "overlay.yaml").write_text(f"experiment: deepseek-r1-sft\n{sources}\n")
    done = site.snakemake("--", "render")
    assert done.returncode == 0, done.stdout + done.stderr
    return site


def shown(site: Site, rule: str) -> str:
    return site.plain((site.clone / f"results/deepseek-r1-sft/render/{rule}/{rule}.submission.txt").read_text())


@pytest.mark.parametrize("rule", ["convert_checkpoint", "train"])
def test_preview_of_a_submission_equals_its_golden_file(site: Site, rule: str) -> None:
    call, *_ = shown(site, rule).split("\n---- it runs")
    assert call == (GOLDEN / f"{rule}.submission.txt").read_text()


def test_every_rule_with_a_job_of_its_own_is_previewed(site: Site) -> None:
    files = (site.clone / "results/deepseek-r1-sft/render").glob("*/*.submission.txt")
    jobs = {"prepare_data", "tokenize_data", "prepare_model", "preflight", "rehearse", "train", "snapshot"}
    jobs |= {"convert_checkpoint", "verify_model", "smoke_test", "evaluate_base", "evaluate"}
    assert {file.parent.name for file in files} == jobs


def test_preview_is_what_the_plugin_hands_to_sbatch(site: Site) -> None:
    done = site.snakemake("--retries", "0", "--", "results/deepseek-r1-sft/receipts/prepare_data.json")
    assert site.calls.exists(), done.stdout + done.stderr
    called = [site.plain(word) for word in site.calls.read_text().split("\0")[:-1]]

    call, inner, own = (
        part.split("\n", 1)[1].replace("\\\n", "") for part in shown(site, "prepare_data").split("---- ")[1:]
    )
    assert "workflow/scripts/prepare_data.py --source resources/demo/chats.jsonl" in own
    expected = shlex.split(call)[1:]
    called[called.index("--job-name") + 1] = "RUN-ID"
    comment = called.index("--comment") + 1
    called[comment] = re.sub(r" [0-9a-f]{12}$", " FINGERPRINT", called[comment])
    assert called[:-1] == expected[:-1]
    assert shlex.split(called[-1].removeprefix("--wrap=")) == shlex.split(inner)


def test_every_description_of_an_allocation_has_the_keys_of_the_profile(site: Site) -> None:
    text = (site.clone / "profiles/slurm/config.yaml").read_text()
    keys = {
        "train": 'constraint: "h100&rack1"\n    qos: long\n    exclude: gpu-n\n    reservation: week',
        "smoke_test": "constraint: h200\n    exclude: node7",
        "serve": "qos: lasting",
    }
    for rule, lines in keys.items():
        assert f"\n  {rule}:" in text
        text = re.sub(rf"(\n  {rule}:[^\n]*)", lambda match, lines=lines: f"{match[1]}\n    {lines}", text)
    text = text.replace("runtime: 5760 ", "runtime: 4-00:00:00 ").replace('gres: "gpu:8"', 'gres: "gpu:h100:8(S:0-1)"')
    (site.clone / "profiles/keyed").mkdir()
    (site.clone / "profiles/keyed/config.yaml").write_text(text)
    done = site.snakemake("--profile", "profiles/keyed", "--config", "results=keyed", "--", "render")
    assert done.returncode == 0, done.stdout + done.stderr

    def script(rule: str) -> set[str]:
        path = site.clone / f"keyed/deepseek-r1-sft/render/{rule}/{rule}.sbatch"
        return {line.removeprefix("#SBATCH ") for line in path.read_text().splitlines() if line.startswith("#SBATCH")}

    nodes = {"--constraint='h100&rack1'", "--qos=long", "--exclude=gpu-n", "--reservation=week", "--gres=gpu:h100:8"}
    assert nodes | {"--time=5760", "--signal=USR1@3600", "--job-name=deepseek-r1-sft_train"} <= script("train")
    assert all(nodes | {"--time=60"} <= script(rule) for rule in ("preflight", "rehearse"))
    assert {"--constraint=h200", "--exclude=node7", "--gres=gpu:h100:8"} <= script("smoke_test")
    assert {"--constraint=h200", "--exclude=node7", "--qos=lasting"} <= script("serve")
    for rule in ("train", "preflight"):
        submission = (site.clone / f"keyed/deepseek-r1-sft/render/{rule}/{rule}.submission.txt").read_text()
        call = shlex.split(submission.split("---- it runs")[0].split("submitted with\n")[1].replace("\\\n", ""))
        assert {"h100&rack1", "--qos=long", "--exclude=gpu-n", "--reservation=week", "--gres=gpu:h100:8"} <= set(call)


def test_a_key_that_the_plugin_would_refuse_ends_a_dry_run_with_the_line_to_write(site: Site) -> None:
    done = site.snakemake("-n", "--set-resources", "train:slurm_extra='--constraint=h100'", "--", "plan")
    assert done.returncode != 0
    assert "profile, set-resources: train: slurm_extra: --constraint=h100" in done.stderr + done.stdout
    assert "write constraint: h100 in its place" in done.stderr + done.stdout
