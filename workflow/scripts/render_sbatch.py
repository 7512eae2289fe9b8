"""Write a stage's sbatch script and its settings file, from settings and the resources of the job.

The rule of a multi-node stage calls this inside its own allocation and then executes the script, so that script and
allocation cannot differ. The written file also works by hand: `sbatch results/<experiment>/train/train.sbatch`.
"""

import dataclasses
import sys
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, containers, files, local_copies, receipts, secrets_file, stages
from deepseek_sft.slurm import sbatch

PROJECT = Path(__file__).resolve().parents[2]


def trained_template(results: Path) -> str:
    """The template that training chose by itself; ``auto`` before it did."""
    receipt = results / "receipts" / "tokenize_data.json"
    return (
        receipts.read(receipt, "tokenize_data", {"settings": {"template": str}})["settings"]["template"]
        if receipt.exists()
        else "auto"
    )


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("stage", choices=stages.OVER_NODES)
    parser.add_argument("--output", type=Path, required=True, help="folder for <stage>.sbatch and settings.json")
    parser.add_argument("--results", required=True, help="results/<experiment>")
    parser.add_argument("--logs", required=True, help="logs/<experiment>")
    parser.add_argument("--settings", required=True, help="the stage's settings, a JSON object")
    parser.add_argument("--operational", default="{}", help="settings that only steer the run, a JSON object")
    parser.add_argument(
        "--preflight", help="settings of a first step that checks the nodes, a JSON object; without it there is none"
    )
    parser.add_argument("--judge", help="what a rehearsal is judged by, a JSON object")
    parser.add_argument("--training-resources", default="{}", help="and what the profile gives to training, likewise")
    parser.add_argument("--python", required=True, help="interpreter of the stage's environment")
    parser.add_argument("--activate", default="", help="shell line that activates the environment")
    parser.add_argument("--step", default="{}", help="srun and container of envs.<stage>, a JSON object")
    parser.add_argument("--archive", help="archive of the environment, to be unpacked on each node to the two folders:")
    parser.add_argument("--environment", help="the environment's, from which --python runs")
    parser.add_argument("--code", help="our code's")
    parser.add_argument("--accelerator", choices=["cuda", "cpu"], required=True)
    fields = dataclasses.fields(sbatch.Allocation)
    for field in fields:
        parser.add_argument(
            sbatch.option(field.name), type=field.type, default=field.default, help=field.metadata["meaning"]
        )
    arguments = parser.parse_args()

    files.require_writable(arguments.output / "settings.json")
    settings = cli.json_object("--settings", arguments.settings) | cli.json_object(
        "--operational", arguments.operational
    )
    smoke_test = settings.get("smoke_test")
    if isinstance(smoke_test, dict) and smoke_test.get("template") == "auto":
        smoke_test["template"] = trained_template(Path(arguments.results))
    allocation = sbatch.Allocation(**{field.name: getattr(arguments, field.name) for field in fields})
    environment = settings.pop("environment", {}) if stages.environment_of(arguments.stage) == "train" else {}
    if arguments.stage in ("rehearse", "train") and (path := settings.pop("secrets_file", None)):
        environment = environment | {secrets_file.VARIABLE: path}
    ranks_per_node = settings.pop("ranks_per_node", None)
    spare = settings.pop("spare_nodes", 0)
    spare_nodes = spare if arguments.stage == "train" else 0  # a rehearsal trains on all of its nodes
    step = cli.json_object("--step", arguments.step)
    contained = containers.of("", step) is not None
    script = sbatch.render(
        arguments.stage,
        allocation,
        {
            "project": str(PROJECT),
            "experiment": Path(arguments.results).name,
            "results": arguments.results,
            "logs": arguments.logs,
            "python": arguments.python,
            "activate": arguments.activate,
            "accelerator": arguments.accelerator,
            "environment": environment,
            "ranks_per_node": ranks_per_node,
            "preflight": arguments.preflight is not None,
            "local": arguments.archive
            and local_copies.LocalCopies(arguments.archive, arguments.environment, arguments.code),
            "spare_nodes": spare_nodes,
            "evaluated": "evaluation" in settings,
            "srun": containers.srun_options(step, str(PROJECT), environment),
            "launcher": containers.launcher(step, str(PROJECT), arguments.accelerator),
            # of what runs beside the steps: in the batch script, outside of any container
            "host_python": sys.executable if contained else arguments.python,
            "contained": contained,
        },
    )
    files.write_json(arguments.output / "settings.json", settings)
    if arguments.preflight is not None:
        files.write_json(arguments.output / "preflight.json", cli.json_object("--preflight", arguments.preflight))
    if arguments.judge is not None:
        judge = {
            "options": cli.json_object("--judge", arguments.judge),
            "resources": cli.json_object("--training-resources", arguments.training_resources),
        }
        files.write_json(arguments.output / "judge.json", judge)
    files.write_text(arguments.output / f"{arguments.stage}.sbatch", script)
    # A job submitted by hand whose output file cannot be made fails without a word.
    Path(arguments.logs, arguments.stage).mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    cli.run(main)
