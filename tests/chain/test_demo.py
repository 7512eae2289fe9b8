"""The promises of `make demo`, kept by one run of the whole chain on the emulated cluster, interrupted once.

A copy of the working tree is used, so that nothing that was built or run here before can help, except the environments.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import docs_pages
import pytest
import yaml
from project_copy import copy_of

pytestmark = [pytest.mark.chain, pytest.mark.cluster]

CONFIG = ["--configfile", "config/experiments/demo.yaml"]
CANARY = secrets.token_hex(16)  # made anew: the copy of the checkout holds this file too


class Demo:
    """A clone in which `make demo` runs."""

    def __init__(self, folder: Path, store: Path):
        self.folder = folder
        self.results = folder / "results" / "demo"
        self.environment = os.environ | {"ENVS_CACHE": str(store), "PYTHONDONTWRITEBYTECODE": "1"}

    def make(self, log: Path) -> subprocess.Popen:
        """Start `make demo` as a terminal's foreground process group would."""
        with log.open("w") as output:
            return subprocess.Popen(
                ["make", "demo"],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run snakemake on this host, for dry runs and for errors before any job."""
        return subprocess.run(
            [".envs/workflow/bin/snakemake", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def receipt(self, rule: str) -> dict:
        return json.loads((self.results / "receipts" / f"{rule}.json").read_text())

    def processes(self) -> list[str]:
        """Command lines of processes that belong to the clone."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                place = str((process / "cwd").readlink())
            except OSError:
                continue  # it has ended, or is a kernel thread
            if str(self.folder) in f"{command} {place}" and int(process.name) != os.getpid():
                found.append(f"{process.name} {command}")
        return found


class SecretsSeen(threading.Thread):
    """Looks at all processes once a second: who has the secret on its command line, and who in its environment."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.on_command_lines: set[str] = set()
        self.in_environments_of: set[str] = set()
        self.over = threading.Event()

    def run(self) -> None:
        secret = CANARY.encode()
        while not self.over.wait(1):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    command, environment = ((process / name).read_bytes() for name in ("cmdline", "environ"))
                except OSError:
                    continue  # it has ended
                if secret in command:
                    self.on_command_lines.add(command.decode(errors="replace"))
                if secret in environment:
                    self.in_environments_of.add(command.replace(b"\0", b" ").decode(errors="replace"))


def plant_secrets(folder: Path) -> None:
    """Give training and serving a file of secrets; these keys re-run nothing."""
    (folder / "secrets").write_text(f"HF_TOKEN={CANARY}\n")
    (folder / "secrets").chmod(0o600)
    path = folder / "config/config.yaml"
    config = yaml.safe_load(path.read_text())
    for section in ("train", "serve"):
        config[section] = (config.get(section) or {}) | {"secrets_file": "secrets"}
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def traces(demo: Demo) -> dict[str, object]:
    """What an emulated cluster could leave behind."""
    return {
        "processes": demo.processes(),
        "mounts": [line for line in Path("/proc/mounts").read_text().splitlines() if str(demo.folder) in line],
        "interfaces": sorted(p.name for p in Path("/sys/class/net").iterdir()),
        "cluster folders": sorted(p.name for p in demo.folder.glob(".cluster/*")),
    }


def wait_for_checkpoint(demo: Demo, running: subprocess.Popen, log: Path, limit: float = 900) -> None:
    """Wait until training has committed a checkpoint."""
    deadline = time.monotonic() + limit
    while not list(demo.results.glob("train/runs/*/*/committed.json")):
        assert running.poll() is None, f"make demo ended early:\n{log.read_text()[-5000:]}"
        assert time.monotonic() < deadline, f"no checkpoint within {limit} s:\n{log.read_text()[-5000:]}"
        time.sleep(1)


@pytest.fixture(scope="module")
def demo(project, tmp_path_factory) -> Iterator[Demo]:
    """The demo: started, interrupted with Ctrl-C during training, started again, finished."""
    folder = tmp_path_factory.mktemp("demo")
    store = (project / ".envs" / "workflow").resolve().parent
    demo = Demo(copy_of(project, folder), store)
    plant_secrets(demo.folder)
    before = traces(demo)
    demo.secrets = SecretsSeen()
    demo.secrets.start()

    interrupted = folder / "interrupted.log"
    running = demo.make(interrupted)
    wait_for_checkpoint(demo, running, interrupted)
    os.killpg(running.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    demo.interrupted_code = running.wait(timeout=120)
    demo.interrupted_log = interrupted.read_text()
    demo.left_behind = (before, traces(demo))

    finished = folder / "finished.log"
    code = demo.make(finished).wait(timeout=3000)
    demo.log = finished.read_text()
    demo.secrets.over.set()
    if code:
        logs = "".join(f"\n== {p}\n{p.read_text()[-3000:]}" for p in demo.folder.glob("logs/demo/*.log"))
        pytest.fail(f"make demo exited with {code}\n{demo.log[-5000:]}{logs}")
    demo.after = traces(demo)
    yield demo
    for process in demo.processes():  # only if a test failed
        os.kill(int(process.split()[0]), signal.SIGKILL)


def test_interrupted_demo_fails_and_leaves_nothing_behind(demo):
    before, after = demo.left_behind
    assert demo.interrupted_code != 0
    assert after == before


def test_finished_demo_leaves_nothing_behind(demo):
    assert demo.after == demo.left_behind[0]


def test_secrets_are_in_environments_alone(demo):
    seen = demo.secrets
    assert any("xtuner_engine" in command for command in seen.in_environments_of)
    assert any("vllm" in command for command in seen.in_environments_of)
    assert seen.on_command_lines == set()
    files = [path for path in demo.folder.parent.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 100
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == [
        demo.folder / "secrets",
    ]


def test_second_run_resumed_from_the_last_checkpoint(demo):
    assert demo.receipt("train")["figures"]["resumed_from_step"] > 0


def test_training_and_serving_took_part_on_two_nodes_under_slurm(demo):
    for rule in ("train", "smoke_test"):
        receipt = demo.receipt(rule)
        assert len(set(receipt["hosts"])) == 2, receipt["hosts"]
        assert receipt["slurm"]["job_id"].isdigit()


def test_training_learned_the_task(demo):
    figures = demo.receipt("train")["figures"]
    assert figures["first_loss"] > 8
    assert figures["last_loss"] < 0.5


def test_broken_records_ended_in_rejects(demo):
    figures = demo.receipt("prepare_data")["figures"]
    broken = (demo.folder / "resources/demo/broken.jsonl").read_text().splitlines()
    assert figures["rejected"] == len(broken)
    assert figures["accepted"] + figures["rejected"] == figures["records"]
    assert len((demo.results / "data/rejects.jsonl").read_text().splitlines()) == len(broken)


def test_converted_model_was_verified(demo):
    checks = demo.receipt("verify_model")["figures"]["checks"]
    assert checks
    assert all(check["passed"] for check in checks.values())


def test_served_model_closes_its_reasoning_and_answers(demo):
    figures = demo.receipt("smoke_test")["figures"]
    assert figures["prompts"] == 50
    assert figures["format_rate"] >= 0.9
    assert figures["skipped"] == {}
    assert all(check["passed"] for check in figures["checks"].values())


def test_report_is_written_and_named_at_the_end(demo):
    assert (demo.results / "report.html").stat().st_size > 10_000
    assert "results/demo/report.html" in demo.log[-3000:]


def test_second_make_runs_no_job(demo, tmp_path):
    log = tmp_path / "again.log"
    assert demo.make(log).wait(timeout=300) == 0
    assert "Nothing to be done" in log.read_text()


def overlay(demo: Demo, text: str) -> list[str]:
    """Arguments for a further configuration file with this text."""
    path = demo.folder / "overlay.yaml"
    path.write_text(f"experiment: demo\n{text.replace('experiment: demo', '')}")
    return ["--configfile", "config/experiments/demo.yaml", "overlay.yaml", "--profile", "profiles/demo"]


def would_run_with(demo: Demo, text: str) -> set[str]:
    done = demo.snakemake("--dry-run", *overlay(demo, text))
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout + done.stderr
    table = re.search(r"Job stats:\n.*?\ntotal", output, re.DOTALL)
    return set(re.findall(r"^(\w+) +\d+$", table[0], re.MULTILINE)) - {"all", "total"} if table else set()


def test_changed_smoke_test_setting_runs_smoke_test_and_report_alone(demo):
    assert would_run_with(demo, "smoke_test: {min_format_rate: 0.8}") == {"smoke_test", "build_report"}


def test_changed_learning_rate_runs_train_and_what_follows_but_not_the_data(demo):
    rules = would_run_with(demo, "train: {learning_rate: 1.0e-4}")
    assert rules == {"train", "convert_checkpoint", "verify_model", "smoke_test", "build_report"}


def test_operational_setting_runs_nothing(demo):
    assert would_run_with(demo, "train: {save_every_steps: 7}") == set()


def test_key_order_comment_whitespace_and_rebuilt_environment_run_nothing(demo):
    config = demo.folder / "config/config.yaml"
    reordered = dict(reversed(yaml.safe_load(config.read_text()).items()))
    config.write_text("# another comment\n" + yaml.safe_dump(reordered, sort_keys=False))
    rule = demo.folder / "workflow/rules/train.smk"
    rule.write_text(rule.read_text().replace('settings("train")', 'settings( "train" )'))
    assert '( "train" )' in rule.read_text()
    for marker in demo.folder.glob(".envs/*.json"):
        marker.touch()
    assert would_run_with(demo, "experiment: demo") == set()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {learnin_rate: 1}", ["train.learnin_rate", "learning_rate"]),
        (
            "data: {sources: [resources/demo/chat.jsonl]}",
            ["resources/demo/chat.jsonl", "does not exist", "chats.jsonl"],
        ),
    ],
)
def test_bad_configuration_stops_before_any_job_with_one_message(demo, text, words):
    done = demo.snakemake(*overlay(demo, text))
    output = done.stdout + done.stderr
    assert done.returncode != 0
    for word in words:
        assert word in output
    assert "Traceback" not in output
    assert "Execute" not in output


def test_more_nodes_than_the_cluster_has_stop_before_any_job(demo):
    profile = yaml.safe_load((demo.folder / "profiles/demo/config.yaml").read_text())
    profile["set-resources"]["train"]["nodes"] = 9
    (demo.folder / "profiles/nine").mkdir()
    (demo.folder / "profiles/nine/config.yaml").write_text(yaml.safe_dump(profile))
    snakemake = [".envs/workflow/bin/snakemake", "--forcerun", "train", "--profile", "profiles/nine", *CONFIG]
    done = subprocess.run(
        ["cluster/run", "--nodes", "4", "--", *snakemake],
        cwd=demo.folder,
        env=demo.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "9 nodes, but partition train has 4" in output
    assert "write nodes: 4 or less" in output
    assert "external jobid" not in output


def test_new_learning_rate_gets_a_run_folder_of_its_own(demo):
    runs = [path.name for path in (demo.results / "train/runs").iterdir() if path.is_dir()]
    assert runs == [demo.receipt("train")["figures"]["run_id"]]


def test_clean_frees_every_checkpoint_of_the_finished_chain_but_the_last(demo):
    train = demo.receipt("train")
    last, run = Path(train["result"]["checkpoint"]).name, demo.results / "train/runs" / train["figures"]["run_id"]
    before = {folder.name for folder in run.glob("step_*")}
    assert before > {last}
    done = demo.snakemake("--profile", "profiles/local", *CONFIG, "--", "clean")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert {folder.name for folder in run.glob("step_*")} == {last}
    assert all(f"removed {run / name}" in output for name in before - {last})


@pytest.fixture(scope="module")
def own(demo) -> Iterator[dict]:
    """The quickstart's own experiment, each block typed as it stands, after the demo; the receipts that it left."""
    page = docs_pages.PROJECT / "docs/quickstart.md"
    blocks = [block for block in docs_pages.blocks(page) if block.argument in ("run", "dry-run", "run after the demo")]
    lines = ["set -euo pipefail", *(line for block in blocks for line in (f"echo '== {block.place}'", block.text))]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=demo.folder,
        env=demo.environment | {"PYTHONPATH": str(demo.folder / "cluster/fastpoll")},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    folder = demo.folder / "results/mine"
    receipts = {path.stem: json.loads(path.read_text()) for path in folder.glob("receipts/*.json")}
    yield receipts | {"printed": done.stdout}


def test_quickstarts_own_experiment_works_as_typed_on_three_nodes(own):
    assert len(set(own["train"]["hosts"])) == 3
    assert "build_report" in own
    assert "mine: Complete: every stage passed" in own["printed"]


def test_gates_of_the_quickstarts_own_experiment_are_judged(own):
    figures = own["smoke_test"]["figures"]
    for gate in ("held_out_format", "held_out_exact_match", "held_out_loss", "loss_drop"):
        assert figures["checks"][gate]["passed"]
