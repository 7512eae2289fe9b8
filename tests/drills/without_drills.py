"""Every mechanism taken out once, and its drill made to fail: `make drills-without`. Figures go to docs/reliability.md.

A mechanism is a passage of the copy's code or templates, and what stands there without it.
"""

import dataclasses
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import drill_site
import pytest
from drill_site import DrillSite
from project_copy import copy_of

pytest.register_assert_rewrite("drills.slurm_drills", "drills.warning_drills")
from drills import slurm_drills, warning_drills  # noqa: E402

site = drill_site.site
LONGEST_S = 150  # a drill that hangs without its mechanism has failed
FAILED = (AssertionError, pytest.fail.Exception)
JOBS, TEMPLATES = "workflow/deepseek_sft/cluster_jobs", "workflow/templates"
LIBRARY, UNIT = "workflow/deepseek_sft", "tests/unit"
TRAIN, MACROS = f"{TEMPLATES}/train.sbatch.j2", f"{TEMPLATES}/macros.sbatch.j2"


@dataclasses.dataclass(frozen=True)
class Mechanism:
    name: str
    file: str
    there: str
    instead: str
    drill: Callable[..., None] | str  # or a file of unit tests
    also: tuple[str, str, str] | None = None  # a second net behind it


MECHANISMS = [
    Mechanism(
        "the job asks for its own requeue",
        TRAIN,
        'patiently scontrol requeue "$SLURM_JOB_ID"',
        "false",
        slurm_drills.test_crashes_with_progress_go_on,
    ),
    Mechanism(
        "attempts without progress are counted",
        TRAIN,
        'if [ "$fruitless" -lt 3 ]',
        "if true",
        slurm_drills.test_three_crashes_without_progress_end_it,
    ),
    Mechanism(
        "the stop file is looked at before a requeue",
        TRAIN,
        '[ ! -e "$stop_file" ] || again=false',
        '[ ! -e "$stop_file" ] || : again=false',
        slurm_drills.test_the_stop_file_ends_for_good,
    ),
    Mechanism(
        "a warning during preflight is passed on",
        MACROS,
        '[ "$warned$code" != 10 ] || code=204',
        ":",
        warning_drills.test_a_warning_during_preflight_starts_no_training,
    ),
    Mechanism(
        "a warning is repeated until training listens",
        TRAIN,
        '[ -z "$warned" ] || kill -USR1 "$program"',
        ":",
        warning_drills.test_a_warning_while_training_starts_is_heard_once_it_listens,
    ),
    Mechanism(
        "the time of the warning is known",
        MACROS,
        '[ "$limit" -gt "$warning_s" ]',
        "false",
        warning_drills.test_a_warning_that_comes_before_anything_runs_is_known_from_the_time,
    ),
    Mechanism(
        "jobs of an earlier Snakemake are found again",
        f"{JOBS}/commands.py",
        "if job.fingerprint == fingerprint and (shared or job.name == run):",
        "if False:",
        slurm_drills.test_kill_9_then_the_same_command,
    ),
    Mechanism(
        "Snakemake's lock is taken over from a dead process",
        f"{JOBS}/start.py",
        "    for record in dead:\n        mine =",
        "    for record in ():\n        mine =",
        slurm_drills.test_a_closed_terminal_then_the_same_command,
    ),
    Mechanism(
        "a running job with other settings is refused",
        f"{JOBS}/start.py",
        "elif not made & set(rule.inputs):",
        "elif False:",
        slurm_drills.test_other_settings_beside_a_running_job_are_refused,
        also=(f"{JOBS}/commands.py", "if found and shared:", "if False:"),
    ),
    Mechanism(
        "Ctrl-C cancels what is noted, and looks again at the end",
        f"{JOBS}/start.py",
        "    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):",
        "    if True:",
        slurm_drills.test_ctrl_c_at_any_moment_leaves_no_job,
    ),
    Mechanism(
        "sacct answers from squeue where there is no slurmdbd",
        f"{JOBS}/commands.py",
        'if name in ("squeue", "sacct") and any(',
        'if name == "squeue" and any(',
        slurm_drills.test_a_plugin_that_turns_to_sacct_keeps_its_job,
    ),
    Mechanism(
        "sbatch asks again",
        f"{JOBS}/commands.py",
        "return queue.patiently(ask, say=_tell, give_up=record.interrupted_file.exists)",
        "return ask()",
        slurm_drills.test_sbatch_that_fails_once_does_not_end_the_chain,
    ),
    Mechanism(
        "squeue is asked again at a resume",
        f"{JOBS}/queue.py",
        "if not is_transient(answer) or time",
        "if True or time",
        slurm_drills.test_squeue_that_is_silent_for_a_minute_at_resume,
    ),
    Mechanism(
        "who holds the run's lock looks whether it is still its own",
        "workflow/deepseek_sft/training/lock.py",
        "        if found == self.own:\n            return",
        "        return",
        slurm_drills.test_an_orphan_beside_its_requeue_is_stopped_by_the_lock,
    ),
    Mechanism(
        "takers of a dead lock agree on one",
        "workflow/deepseek_sft/training/lock.py",
        '    with _hold(path.with_name(f"{NAME}.{hashlib.sha256(found.encode()).hexdigest()[:16]}"), {}):\n'
        "        if _read(path) == found:\n            path.unlink(missing_ok=True)",
        "    path.unlink(missing_ok=True)",
        slurm_drills.test_a_thousand_takers_of_a_dead_lock,
    ),
    Mechanism(
        "jobs ask to be requeued (slurm-requeue)",
        "profiles/demo/config.yaml",
        "slurm-requeue: true",
        "slurm-requeue: false",
        slurm_drills.test_a_preemption_costs_the_steps_since_the_last_save,
    ),
    Mechanism(
        "a second Snakemake is refused",
        f"{JOBS}/start.py",
        "    refuse_twin(logs, set(needed), own)\n",
        "",
        slurm_drills.test_two_snakemakes_of_one_experiment,
        # Snakemake's own lock refuses as well; it does not say who holds it.
        also=(f"{JOBS}/start.py", 'return "wait for it or stop it; do not use --unlock"', 'return "?"'),
    ),
]

# Mechanisms whose drill is a unit test: no cluster is needed.
IN_UNIT_TESTS = [
    Mechanism(
        "checksums of what resuming reads",
        f"{LIBRARY}/convert/rank_state.py",
        "if error := checksums.error_of(verdict.damaged):",
        "if error := None:",
        f"{UNIT}/convert/test_resume.py",
    ),
    Mechanism(
        "restricted unpickler",
        f"{LIBRARY}/tensors/torch_pickle.py",
        'raise UnknownNameError(f"it asks for {module}.{name}, which no checkpoint needs")',
        "return super().find_class(module, name)",
        f"{UNIT}/convert/test_gadgets.py",
    ),
    Mechanism(
        "judging of the marker",
        f"{LIBRARY}/training/checkpoints.py",
        "if reason := _malformed(marker):",
        "if reason := None:",
        f"{UNIT}/convert/test_resume.py",
    ),
    Mechanism(
        "sums of token shards",
        f"{LIBRARY}/data/tokens.py",
        "if found != expected:",
        "if False:",
        f"{UNIT}/data/test_token_sums.py",
    ),
    Mechanism(
        "sums of the base",
        f"{LIBRARY}/convert/base_sums.py",
        'elif digest != sums[name]["sha256"]:',
        "elif False:",
        f"{UNIT}/convert/test_base_sums.py",
    ),
    Mechanism(
        "faults of disks in words",
        f"{LIBRARY}/cli.py",
        "if fault := environment_faults.explain(error):",
        "if fault := None:",
        f"{UNIT}/test_environment_faults.py",
    ),
    Mechanism(
        "removal of leftovers",
        f"{LIBRARY}/files.py",
        "leftovers.sweep([folder])",
        "pass",
        f"{UNIT}/test_environment_faults.py",
    ),
    Mechanism(
        "keys that stand twice",
        f"{LIBRARY}/json_files.py",
        "if len(value) != len(pairs):",
        "if False:",
        f"{UNIT}/test_json_files.py",
    ),
    Mechanism(
        "types in receipts",
        f"{LIBRARY}/receipts.py",
        "        check(receipt)\n",
        "",
        f"{UNIT}/test_json_files.py",
    ),
    Mechanism(
        "recognition of copies",
        f"{LIBRARY}/adoption.py",
        "if found := foreign(results):",
        "if found := None:",
        f"{UNIT}/test_adoption.py",
    ),
    Mechanism(
        "a log that cannot be written",
        "workflow/scripts/stage.sh",
        "exit 2\nfi\necho",
        "fi\necho",
        f"{UNIT}/test_environment_faults.py",
    ),
]


@pytest.mark.cluster
@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda mechanism: mechanism.name)
def test_a_drill_fails_without_its_mechanism(site: DrillSite, mechanism: Mechanism, tmp_path: Path) -> None:
    texts = {}
    for name, there, instead in filter(None, [(mechanism.file, mechanism.there, mechanism.instead), mechanism.also]):
        text = (site.clone / name).read_text()
        texts.setdefault(name, text)
        assert text.count(there) == 1, f"{name} has changed: name the mechanism's passage anew"
        (site.clone / name).write_text(text.replace(there, instead))
    site.longest = LONGEST_S
    site.profile()
    begin = time.monotonic()
    try:
        given = {"site": site, "tmp_path": tmp_path}
        given = {name: given[name] for name in inspect.signature(mechanism.drill).parameters}
        with pytest.raises(FAILED) as failure:
            mechanism.drill(**given)
    finally:
        for name, text in texts.items():
            (site.clone / name).write_text(text)
        site.wake_controller()
        site.clean()
    lines = str(failure.value).strip().splitlines() or [failure.type.__name__]
    told = next((line for line in lines if line.startswith(("assert ", "waited ", "snakemake has not"))), lines[0])
    figures = {"without": mechanism.name, "failed": mechanism.drill.__name__, "told": told}
    with open(drill_site.FIGURES, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(figures | {"seconds": round(time.monotonic() - begin)}) + "\n")


@pytest.mark.parametrize("mechanism", IN_UNIT_TESTS, ids=lambda mechanism: mechanism.name)
def test_a_unit_test_fails_without_its_mechanism(project: Path, tmp_path: Path, mechanism: Mechanism) -> None:
    clone = copy_of(project, tmp_path)
    (clone / ".envs").symlink_to(project / ".envs")
    text = (clone / mechanism.file).read_text()
    assert text.count(mechanism.there) == 1, f"{mechanism.file} has changed: name the mechanism's passage anew"
    (clone / mechanism.file).write_text(text.replace(mechanism.there, mechanism.instead))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(mechanism.drill)]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 1, f"{mechanism.drill} passes without it"
    assert "\nFAILED" in done.stdout, done.stdout
