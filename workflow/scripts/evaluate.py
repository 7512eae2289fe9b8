"""Judge the model's results on its tasks, or record the base's; what is not measured yet is served by --script first.

The smoke test's job has evaluated the model where both were asked for; then nothing is served here. The receipt is
written only if every gate passes; otherwise the exit code is 3, and each failed gate is told in a sentence.
"""

import subprocess
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, files
from deepseek_sft.errors import BadInputError
from deepseek_sft.serving import settings as settings_file
from deepseek_sft.task_evaluation import stage, verdict


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("rule", choices=[stage.MODEL, stage.BASE], help="whose results")
    parser.add_argument("--results", type=Path, required=True, help="results/<experiment>")
    parser.add_argument("--settings", type=Path, required=True, help="settings.json of the deployment")
    parser.add_argument("--script", type=Path, help="serves what is not measured yet; without it nothing is served")
    parser.add_argument("--receipt", type=Path, required=True, help="receipt to write, receipts/<rule>.json")
    arguments = parser.parse_args()

    files.require_writable(arguments.receipt)
    settings = settings_file.read(arguments.settings).evaluation
    if settings is None:
        raise BadInputError(f"{arguments.settings} has no evaluation")
    if not stage.is_measured(settings, arguments.results, arguments.rule):
        if arguments.rule == stage.MODEL:
            stage.raise_reason(arguments.results)
        if arguments.script and (code := subprocess.run(["bash", str(arguments.script)], check=False).returncode):
            return code if code > 0 else 5
    if arguments.rule == stage.BASE:
        figures = stage.record_base(settings, arguments.results, arguments.receipt)
        for name, task in figures["tasks"].items():
            cli.say(f"  {name}: {task['score']['mean']:.3f} of {task['items']} items; receipt {arguments.receipt}")
        return 0
    found = stage.judge(settings, arguments.results, arguments.receipt)
    for name, task in found.tasks.items():
        cli.say(f"  {name}: {verdict.said(task)}")
    cli.say(f"all {len(found.checks)} gates passed; receipt {arguments.receipt}")
    return 0


if __name__ == "__main__":
    cli.run(main)
