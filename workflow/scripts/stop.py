"""Let training save after its current step and end for good (exit code 4), and wait until it has.

    stop.py results/mine        also: snakemake stop --profile … --configfile …

Jobs of training that have not begun are cancelled. `rm results/mine/train/stop` allows training again.
Exit codes: 0 nothing of it runs any longer; 5 Slurm does not answer.
"""

from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli
from deepseek_sft.cluster_jobs import stop
from deepseek_sft.report import collect


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("results", type=Path, help="results/<experiment>")
    parser.add_argument("--logs", type=Path, help="folder of the experiment's logs; found beside RESULTS if not given")
    parser.add_argument("--no-wait", action="store_true", help="ask only")
    arguments = parser.parse_args()
    logs = arguments.logs or collect.default_logs(arguments.results)
    cli.say(stop.stop(arguments.results, logs, Path.cwd(), wait=not arguments.no_wait))


if __name__ == "__main__":
    cli.run(main)
