# Configuration, paths and the functions that rules use. The logic lies in workflow/deepseek_sft, where it is tested.
import subprocess
import sys
import time
from pathlib import Path
from shlex import quote

sys.path.insert(0, f"{workflow.basedir}/workflow")

from snakemake.exceptions import WorkflowError

try:
    from deepseek_sft import chain as stages_chain
    from deepseek_sft import (
        adoption,
        ending,
        environment_faults,
        environments,
        json_files,
        known_at_start,
        locks,
        notify,
        place,
        stages,
        starting,
        terminal,
    )
    from deepseek_sft.cluster_jobs import holders
    from deepseek_sft.cluster_jobs import start as cluster_start
    from deepseek_sft.command_line import read_yaml
    from deepseek_sft.errors import StageError
    from deepseek_sft.experiment import Experiment
    from deepseek_sft.files import canonical_json
    from deepseek_sft.planning import rehearsed
    from deepseek_sft.site import questions
    from deepseek_sft.slurm import job_names, submission_preview
    from deepseek_sft.slurm import snakemake_resources as job_resources
    from deepseek_sft.training import retention, slow_nodes
except ModuleNotFoundError as error:
    raise WorkflowError(
        f"this Snakemake runs in {sys.executable}, which has no {error.name}\n"
        "  fix: source .envs/workflow/bin/activate   (made by `python3 workflow/scripts/build_env.py workflow`)"
    )

TERMINAL = terminal.Terminal(workflow) if workflow.is_main_process else None

try:
    if TERMINAL:
        place.check_folder(Path(workflow.basedir))
    EXPERIMENT = Experiment.from_config(config)
    if TERMINAL:
        files = ["config/config.yaml", *workflow.overwrite_configfiles]
        for file in files:
            read_yaml(str(file))  # Snakemake has read them, and lets the later of two equal keys win
        unnamed = starting.unnamed(config, files, workflow.config_settings.config_args)
        if unnamed and not TERMINAL.dry_run:
            raise unnamed
        elif unnamed:
            TERMINAL.warn(f"would be refused: {unnamed}")
except (StageError, OSError) as error:
    raise WorkflowError(environment_faults.in_words(error))

RESULTS = EXPERIMENT.results
SPARE_NODES = EXPERIMENT.config["train"]["spare_nodes"]
STATED_RESOURCES = {}  # rule → resources that the profile states; filled in by complete_resources
PLANNED = ("nodes", "gres", "mem_mb", "runtime", "slurm_extra")  # resources that a plan looks at
CHAIN_FORCED = {}  # rule → why it runs again though Snakemake sees no reason; filled in by check_targets
TELLS = []  # not empty once the user's command was told that this run has started
CHAIN_LOST = {}  # rule → why it cannot run any more without training again
LOGS = EXPERIMENT.logs
SCRIPT = f"{quote(EXPERIMENT.environment('workflow').python)} workflow/scripts"


def literal(text):
    """Text that Snakemake's formatting of shell commands leaves as it is."""
    return text.replace("{", "{{").replace("}", "}}")


def stage(command):
    """Shell text of a stage: its output goes to a log of this attempt, its exit code to retries."""
    return f"workflow/scripts/stage.sh {{log}} {{resources.attempt}} {command}"


def script(command):
    """Shell text of a stage that runs one of workflow/scripts in the workflow's environment."""
    return stage(f"{SCRIPT}/{command}")


def operational(rule):
    """Arguments that steer a rule's run and are no params, so that changing them re-runs nothing."""
    return literal(EXPERIMENT.operational_arguments(rule))


def operational_json(rule):
    """The same as one JSON argument."""
    return literal(quote(EXPERIMENT.operational(rule)))


def render(rule, folder, allocation=None):
    """Shell text that writes a rule's sbatch script and settings, by default from the resources of the very job."""
    place = f"{EXPERIMENT.render_arguments(rule)} --output {RESULTS}/{folder}"
    allocation = allocation or job_resources.own_allocation(workflow, rule)
    return (
        f"{SCRIPT}/render_sbatch.py {rule} {literal(place)} --settings {{params.settings:q}} "
        f"--operational {operational_json(rule)} {allocation}"
    )


def rendered_stage(rule, folder, arguments="", more=""):
    """Shell text that writes a rule's sbatch script and runs it, both as one attempt with one log.

    ``more`` are further options of render_sbatch.py.
    """
    return stage(f"{render(rule, folder)} {more} --then bash {RESULTS}/{folder}/{rule}.sbatch {arguments}".rstrip())


def passed_before_evaluation(wildcards):
    """The smoke test where it is a target as well, since its job asks the tasks; `evaluate` alone serves the model."""
    return [receipt("smoke_test")] if "smoke_test" in job_resources.requested(workflow) else []


def evaluated_stage(rule, folder):
    """Shell text that makes a rule's results, on nodes where they are not there yet, and judges them."""
    place = f"{RESULTS}/{folder}"
    judged = f"{SCRIPT}/evaluate.py {rule} --results {RESULTS} --settings {place}/settings.json"
    judged += f" --script {place}/{rule}.sbatch --receipt {{output.receipt}}"
    return stage(f"{render(rule, folder)} --then {judged}")


def deploy():
    """Shell text that submits the lasting deployment and tells on the terminal where it is reached."""
    rendering = render("serve", folder="serve/deployment", allocation="{params.allocation}")
    # tee ignores Ctrl-C: serve.py has yet to say that it cancelled the job
    return f"({rendering} && {SCRIPT}/serve.py --results {RESULTS} --logs {LOGS}) 2>&1 | tee -i {{log}}"


def render_place(wildcards):
    """Paths and interpreter of a stage's script, for reading it before anything runs."""
    return EXPERIMENT.render_arguments(wildcards.stage)


def judged_by():
    """Shell text of render_sbatch.py's options that say what a rehearsal is judged by."""
    return f"--judge {literal(quote(EXPERIMENT.rehearsal_options()))} --training-resources {{params.resources:q}}"


def settings_of(wildcards):
    return EXPERIMENT.settings(wildcards.stage)


def operational_of(wildcards):
    return EXPERIMENT.operational(wildcards.stage)


def allocation_of(wildcards):
    """Arguments that describe the allocation that another rule will get, from profile and command line."""
    if wildcards.stage == "serve":
        return allocation_of_deployment(wildcards)
    return job_resources.allocation(workflow.get_rule(wildcards.stage)).arguments()


def jobs_to_preview(wildcards):
    """Texts for the rules that Snakemake's plugin submits to Slurm; none under a profile without Slurm."""
    if not submission_preview.is_previewed(workflow):
        return []
    jobs = [one.name for one in workflow.rules if not workflow.is_local(one)]
    return [f"{RESULTS}/render/{job}/{job}.submission.txt" for job in jobs]


def submission_of(wildcards):
    """What the plugin would submit for a rule."""
    return submission_preview.preview(workflow, wildcards.job, EXPERIMENT.config["experiment"])


def resources_of_training(wildcards):
    """What profile and command line give to training, as JSON; what they leave out is not judged by the plan."""
    train = workflow.get_rule("train")
    stated = [name for name in PLANNED if name in STATED_RESOURCES["train"]]
    found = {name: job_resources.value(train, name) for name in stated}
    if "nodes" in found:
        found["nodes"] -= SPARE_NODES  # they do not train
    return canonical_json(found)


def partition_of_training(wildcards):
    """Argument of plan.py that lets it ask Slurm for the memory of training's nodes."""
    return f"--partition={job_resources.value(workflow.get_rule('train'), 'slurm_partition')}"


def allocation_of_deployment(wildcards):
    """The same for the job that target `serve` submits."""
    return job_resources.deployment(workflow).arguments()


def preflight_is_asked():
    """A param that differs at each start: the nodes of yesterday say nothing about those of today."""
    return str(time.time())


def show_plan(folder):
    """Shell text that prints a plan on the terminal: needs, time, notes and verdict, without the formulas."""
    text = f"{RESULTS}/{folder}/plan.txt"
    return f" && sed -n '1,/^parameters$/p; /^note: /p; /^write into the profile:$/,/^$/p; /^verdict: /,$p' {quote(text)} | grep -v '^parameters$'"


def what_clean_removes(wildcards):
    """What target `clean` would free now, or why it would refuse; shown by a dry run."""
    return retention.preview(Path(RESULTS))


def receipt(rule):
    """The receipt of a rule: its only declared output, since Snakemake deletes outputs of failed jobs."""
    return f"{RESULTS}/receipts/{rule}.json"


def path_from(rule, name):
    """Shell text for a path that a receipt names, checked to be still there; one word, whatever it holds."""
    return f'"$({SCRIPT}/receipt_path.py {receipt(rule)} {rule} {name} --for-stage)"'


def log_file(rule):
    """Link to the log of the newest attempt."""
    return f"{LOGS}/{rule}.log"


def benchmark_file(rule):
    """Time and memory of a rule, measured by Snakemake."""
    return f"{RESULTS}/benchmarks/{rule}.tsv"


def build_environments(rules):
    """Build the environments of the stages to run, here where the network is; a current one takes no time.

    Their markers are no inputs: Snakemake drops all jobs behind an `ancient()` input that is made anew in the same run.
    """
    for kind in environments.CHOSEN:
        users, environment = sorted(rules & set(stages.run_by(kind))), EXPERIMENT.environment(kind)
        if users and environment.built:
            build_environment(environment, users)
    users = sorted(rules & {"smoke_test", "evaluate", "evaluate_base"})
    environment = EXPERIMENT.environment(environments.EVALUATE)
    if users and environment.built and EXPERIMENT.evaluated():
        build_environment(environment, users)


def build_environment(environment, users):
    command = [EXPERIMENT.environment("workflow").python, "workflow/scripts/build_env.py"]
    if environment.archive:
        command += ["--archive", environment.archive]
    if subprocess.run([*command, environment.locked]).returncode:
        raise WorkflowError(f"the environment of {', '.join(users)} could not be built, see the message above")


def lock_files(wildcards):
    """Everything that decides what an environment holds."""
    return [str(path.relative_to(workflow.basedir)) for path in locks.lock_files(wildcards.environment)]


def complete_resources(workflow):
    """Fill in what every Slurm job of ours needs."""
    try:
        STATED_RESOURCES.update(job_resources.complete_resources(workflow))
        job_resources.add_spare_nodes(workflow, SPARE_NODES)
        if slow := slow_nodes.read(Path(RESULTS, "train")):
            job_resources.leave_out(workflow, slow)
            for text in slow_nodes.left_out(slow, Path(RESULTS, "train")) if TERMINAL else ():
                TERMINAL.warn(text)
    except (StageError, OSError) as error:
        raise WorkflowError(environment_faults.in_words(error))


def check_targets():
    """What the stages asked for are refused for, and which of them run again since something of theirs has gone."""
    asked = job_resources.requested(workflow)
    wanted = {name: one for name, one in job_resources.allocations(workflow).items() if name in asked}
    try:
        EXPERIMENT.check_shapes(wanted)
        if asked & set(stages.NEEDS):
            adoption.check(Path(RESULTS))
            verdict = stages_chain.judge(Path(RESULTS))
            CHAIN_LOST.update({name: error for name, error in verdict.lost.items() if name in asked})
            CHAIN_FORCED.update({name: why for name, why in verdict.forced.items() if name in asked})
            for text in [f"{name} runs again: {why}" for name, why in CHAIN_FORCED.items()] + verdict.notes:
                TERMINAL.warn(text)
    except (StageError, OSError) as error:
        raise WorkflowError(environment_faults.in_words(error))
    job_resources.force(workflow, CHAIN_FORCED)


def check_jobs():
    """What the jobs to run are refused for, in a dry run too."""
    names = job_resources.rules_to_run(workflow)
    try:
        check_chain(workflow, names)
        job_resources.run_here(workflow, known_at_start.evaluated_without_nodes(EXPERIMENT, names, TERMINAL.dry_run))
        if jobs := names & job_resources.submitted(workflow):
            starting.check_shared(EXPERIMENT.paths_of_nodes(jobs))
    except (StageError, OSError) as error:
        raise WorkflowError(environment_faults.in_words(error))


def check_chain(workflow, rules):
    """Raise StageError where a stage to run would miss what another one made, or train a finished run again."""
    if CHAIN_LOST and "train" not in rules:
        raise next(iter(CHAIN_LOST.values()))
    stages_chain.check_inputs(Path(RESULTS), rules)
    on_purpose = job_resources.is_asked_again(workflow, "train", CHAIN_FORCED)
    stages_chain.check_training(Path(RESULTS), rules, on_purpose)


def check_before_start(workflow):
    """Stop before any job is submitted when a source is missing or the cluster is too small; else note the config."""
    try:
        rules = job_resources.rules_to_run(workflow)
        if rules <= {"status", "watch", "stop"}:  # only looks, also while another start is at work
            return
        EXPERIMENT.check_external_paths(rules)
        known_at_start.check_gates(EXPERIMENT, rules)
        known_at_start.check_tasks(EXPERIMENT, rules)
        notes = list(EXPERIMENT.notes) if "tokenize_data" in rules or "train" in rules else []
        notes += known_at_start.check_template(EXPERIMENT, rules) + known_at_start.check_stack(EXPERIMENT, rules)
        for note in notes:
            TERMINAL.warn(note)
        if jobs := rules & job_resources.submitted(workflow):
            starting.check_slurm_answers(jobs)
        line = submission_preview.options if submission_preview.is_previewed(workflow) else None
        for warning in job_resources.check_allocations(workflow, rules, line):
            TERMINAL.warn(warning)
        if rules & set(stages.run_by("serve")):
            EXPERIMENT.check_deployment(job_resources.allocations(workflow)["smoke_test"])
        if rules & {"prepare_model", "train", "rehearse"}:
            resources = json_files.parse(resources_of_training(None))
            train = job_resources.allocations(workflow).get("train")
            node_mb = train and questions.node_memory_mb(train.partition, train.nodes)
            plan = EXPERIMENT.check_plan(resources, "tokenize_data" not in rules, node_mb)
            if "rehearse" in rules:
                limit = job_resources.allocations(workflow)["rehearse"].runtime
                if note := rehearsed.too_long(plan.duration, limit):
                    TERMINAL.warn(note)
        EXPERIMENT.write_config()
        job_names.name_jobs(workflow, EXPERIMENT.config["experiment"])
        jobs_of_slurm = submission_preview.is_previewed(workflow)
        name = EXPERIMENT.config["experiment"]
        cluster_start.begin(workflow, name, Path(LOGS), Path(RESULTS), THIS_PROCESS, jobs_of_slurm)
    except (StageError, OSError) as error:
        raise WorkflowError(environment_faults.in_words(error))
    build_environments(rules)
    if rules & set(stages.NEEDS):  # not for what only builds, renders or frees
        TELLS.append("started")
        tell_command("started")


def tell_command(event, **told):
    """Start the user's command for an event of the run."""
    if TELLS:
        notify.tell(EXPERIMENT.config["notify"], event, Path(RESULTS), Path(LOGS), **told)


def tell_end(workflow, ok):
    """The last lines of a run; after a failure with the report of what there is."""
    if not TERMINAL:
        return
    seen = TERMINAL.seen
    done = [rule for rule in dict.fromkeys(seen.finished) if rule in stages.NEEDS]
    if ok:
        if done:
            text = ending.finished(done, Path(RESULTS), time.monotonic() - TERMINAL.started)
            TERMINAL.at_end(text)
            tell_command("finished", message=text)
        return
    failures = [] if seen.interrupted else list(seen.failures.values())
    page = build_partial_report() if any(one.rule in stages.SECTIONS for one in failures) else ""
    other = "interrupted: running jobs were cancelled" if seen.interrupted else "\n".join(seen.errors[-1:])
    text = ending.failed(failures, Path(RESULTS), terminal.command_line(), page, other)
    TERMINAL.at_end(text)
    event, told = notify.of_failure(failures, seen.interrupted)
    tell_command(event, message=text, **told)


def build_partial_report():
    """Write the report of what there is, without a receipt; its path, or why there is none."""
    command = [EXPERIMENT.environment("workflow").python, "workflow/scripts/build_report.py", RESULTS]
    done = subprocess.run(command, capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"{RESULTS}/report.html" if done.returncode == 0 else f"could not be written: {last}"


THIS_PROCESS = holders.own()  # now: the Slurm plugin removes SLURM_* from the environment
if not TERMINAL:
    holders.keep_restart_count()
else:
    cluster_start.free_locks_of_the_dead(Path(LOGS), sys.argv, THIS_PROCESS)
    try:
        place.check_writable(RESULTS, LOGS)
    except (StageError, OSError) as error:
        raise WorkflowError(environment_faults.in_words(error))
    # a warning here, since a dry run may come before the data; an error once jobs start
    for problem in EXPERIMENT.missing_paths():
        TERMINAL.warn(problem)
    for problem in known_at_start.gate_warnings(EXPERIMENT):
        TERMINAL.warn(problem)
    job_resources.around_graph(workflow, before=check_targets, after=check_jobs)
