"""The worked examples of profiles/: each resolves, plans with the verdict that its hardware deserves, shows its jobs.

On stand-ins for Slurm's programs: what the plugin would hand to sbatch is shown, and nothing is submitted. 20 s.
"""

import shlex
from pathlib import Path

import pytest
import yaml
from render_site import Site

# The stand-ins answer at once; the profiles' pauses between questions to a real controller are not what is tested.
QUICK = ("--slurm-init-seconds-before-status-checks", "1", "--max-status-checks-per-second", "20", "--quiet", "all")
PROFILES = {
    "a100-16x4": "r1-a100",
    "h200-8x8": "r1-h200",
    "preemption": "r1-preemptible",
    "containers": "r1-containers",
}


@pytest.fixture(scope="module")
def site(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(project, tmp_path_factory.mktemp("profiles"))


@pytest.fixture(scope="module")
def planned(site: Site) -> dict[str, tuple[str, dict[str, list[str]]]]:
    """Profile → its plan's text, and the words of what would be submitted for training and for the smoke test."""
    found = {}
    for profile, experiment in PROFILES.items():
        results = f"results/{experiment}"
        shown = [f"{results}/render/{rule}/{rule}.submission.txt" for rule in ("train", "smoke_test")]
        targets = ["plan", *shown, f"{results}/render/serve/serve.sbatch"]
        done = site.snakemake(*QUICK, "--", *targets, profile=profile, configfile=f"profiles/{profile}/experiment.yaml")
        assert done.returncode == 0, done.stdout + done.stderr
        jobs = {Path(path).parent.name: _submitted(site.clone / path) for path in shown}
        jobs["serve"] = (site.clone / f"{results}/render/serve/serve.sbatch").read_text().splitlines()
        found[profile] = ((site.clone / results / "plan/plan.txt").read_text(), jobs)
    return found


def _submitted(preview: Path) -> list[str]:
    call = preview.read_text().split("---- it runs")[0].split("submitted with\n")[1]
    return shlex.split(call.replace("\\\n", ""))


@pytest.mark.parametrize("profile", PROFILES)
def test_each_site_fits_the_model_that_its_experiment_names(planned, profile):
    text, _ = planned[profile]
    assert text.startswith("model     671,026,419,200 parameters")
    assert "\nverdict: fits (" in text
    assert "refused at start" not in text and "write into the profile" not in text


def test_a100_is_planned_without_what_it_lacks_and_within_a_day_a_job(planned):
    text, jobs = planned["a100-16x4"]
    assert "gpu       a100-80gb: 312 TFLOP/s BF16, 79.10 GiB; products of experts one by one" in text
    assert "no FP8 arithmetic" in text and "Marlin" not in text  # and its experiment asks for none
    assert "attention by torch varlen, padded values" in text
    assert "with 1 d 0 h a job (runtime) the run takes 1 to 2 starts" in text
    for rule, nodes in (("train", 16), ("smoke_test", 8)):
        words = jobs[rule]
        assert {f"--nodes={nodes}", "--gres=gpu:a100:4", "--requeue"} <= set(words)
        assert words[words.index("-A") + 1] == "my-project"
        assert int(words[words.index("-t") + 1]) <= 24 * 60
    assert "#SBATCH --account=my-project" in jobs["serve"] and "#SBATCH --time=1440" in jobs["serve"]


def test_h200_serves_fp8_from_one_node(planned):
    text, jobs = planned["h200-8x8"]
    assert "gpu       h200: 989 TFLOP/s BF16, 139.70 GiB; grouped products" in text
    assert "attention by sdpa, unpadded" in text
    assert {"--nodes=8", "--gres=gpu:h200:8"} <= set(jobs["train"])
    assert {"--nodes=1", "--gres=gpu:h200:8"} <= set(jobs["smoke_test"])


def test_preemption_asks_for_requeue_and_keeps_clients_out_of_the_partition(planned):
    text, jobs = planned["preemption"]
    partitions = {rule: jobs[rule][jobs[rule].index("-p") + 1] for rule in ("train", "smoke_test")}
    assert partitions == {"train": "preemptible", "smoke_test": "gpu"}
    assert "--requeue" in jobs["train"]
    assert "#SBATCH --partition=gpu" in jobs["serve"]
    assert "a checkpoint every" not in text  # the cadence that the experiment asks for is near the best


def test_containers_run_the_stages_that_need_gpus(planned, site):
    _, jobs = planned["containers"]
    assert any(line.startswith("run_on_nodes profiles/containers/serve-python workflow/") for line in jobs["serve"])
    experiment = yaml.safe_load((site.clone / "profiles/containers/experiment.yaml").read_text())
    for own in experiment["envs"].values():
        assert (site.clone / own["python"]).stat().st_mode & 0o111
