"""Judge a rehearsal of training from what its two parts left (train.py --rehearse), and write one page of verdict.

    rehearse.py --clear results/EXPERIMENT/rehearsal              removes the checkpoints of earlier rehearsals
    rehearse.py --rehearsal DIR --judge judge.json --plan-receipt … --receipt …

Two trainings of steps 4 and 5, unbroken and resumed, must be equal; memory, step, save and start are held against the
plan, the watchdog's limits and Slurm's signal; end and cost of the whole run follow. The rehearsal's checkpoint is
removed, logs and metrics stay. Exit code 3 where a check fails; the page is written in any case.
"""

import datetime
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, files, json_files, receipts
from deepseek_sft.errors import GateError
from deepseek_sft.planning import rehearsed
from deepseek_sft.planning.training_resources import read_resources
from deepseek_sft.training import rehearsal

AGAIN = "rehearse again: snakemake rehearse …"


def read_part(folder: Path, part: str) -> dict:
    """The record of one part of a rehearsal.

    Raises:
        BadInputError: it is not there or cannot be read.
    """
    return json_files.read(folder / f"{part}.json", fix=AGAIN)


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--clear", type=Path, help="folder of rehearsals whose checkpoints are removed")
    parser.add_argument("--rehearsal", type=Path, help="folder of the rehearsal to judge")
    parser.add_argument("--judge", type=Path, help="JSON file of resources and options (render_sbatch.py writes it)")
    parser.add_argument("--plan-receipt", type=Path, help="receipt of refine_plan")
    parser.add_argument("--receipt", type=Path, help="receipt to write")
    options = parser.parse_args()
    if options.clear:
        for folder in rehearsal.remove_checkpoints(options.clear):
            cli.say(f"removed {folder}, of an earlier rehearsal")
    if options.rehearsal is None:
        return
    if missing := [name for name in ("judge", "plan_receipt", "receipt") if getattr(options, name) is None]:
        parser.error(f"--rehearsal needs --{missing[0].replace('_', '-')}")
    judge(options.rehearsal, options.judge, options.plan_receipt, options.receipt)


def judge(folder: Path, judge_file: Path, plan_receipt: Path, receipt: Path) -> None:
    """Judge one rehearsal and write page and receipt.

    Raises:
        GateError: a check failed.
    """
    files.require_writable(receipt, folder.parent / "verdict.txt")
    parts = {part: read_part(folder, part) for part in rehearsal.PARTS}
    chosen = json_files.read(judge_file, fix=AGAIN)
    settings = json_files.read(folder.parent / "settings.json", fix=AGAIN)
    plan = receipts.read(plan_receipt, "refine_plan", {"figures": rehearsed.PLANNED})
    verdict = rehearsed.judge(
        parts["unbroken"],
        parts["resumed"],
        plan["figures"],
        settings,
        read_resources(chosen["resources"]),
        chosen["options"],
    )
    ends = datetime.datetime.now().astimezone() + datetime.timedelta(seconds=verdict.figures["run_seconds"])
    text = rehearsed.page(verdict, parts["unbroken"]["hosts"], ends.strftime("%Y-%m-%d %H:%M %Z").strip())
    page = folder.parent / "verdict.txt"
    files.write_text(page, text)
    cli.say(text)
    rehearsal.remove_checkpoints(folder.parent)
    if verdict.failed:
        receipts.write_failed(receipt, "rehearse", verdict.figures)
        details = "\n".join(f"  - {check.name}: {check.detail}" for check in verdict.failed)
        raise GateError(f"the rehearsal found what would stop the run\n{details}", f"see {page}; then rehearse again")
    receipts.write(
        receipt,
        "rehearse",
        inputs=parts["unbroken"]["inputs"] | {"plan": receipts.input_entry(plan_receipt)},
        settings={"options": chosen["options"], "resources": chosen["resources"]},
        result={"verdict": str(page), "parts": str(folder)},
        figures=verdict.figures,
        hosts=parts["unbroken"]["hosts"],
    )


if __name__ == "__main__":
    cli.run(main)
