"""Submit the lasting deployment of an experiment's model, wait until it answers, and say how to use and stop it.

The job serves until its time limit or scancel, whatever becomes of this program afterwards. Until it answers, Ctrl-C
cancels it. A deployment of the same model that is already there is shown and left alone. Needs Slurm; without, the
rendered script serves in the foreground: bash results/<experiment>/serve/deployment/serve.sbatch
"""

from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli
from deepseek_sft.serving import deployment_job


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--results", type=Path, required=True, help="results/<experiment>, with the rendered script")
    parser.add_argument("--logs", type=Path, required=True, help="logs/<experiment>")
    arguments = parser.parse_args()
    cli.say(deployment_job.deploy(arguments.results, arguments.logs).text())


if __name__ == "__main__":
    cli.run(main)
