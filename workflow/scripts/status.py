"""Say on one screen how far a run is: stage, Slurm job and nodes, step, loss, speed, time left, last checkpoint, disk.

    status.py                    the experiment below results/ that was active last
    status.py results/demo       this one
    watch -n 10 make status      again every ten seconds

Only looks: it writes nothing, and a running workflow does not notice. Without Slurm, processes and the age of logs tell
what runs. Exit codes: 0 shown, whatever it says of the run; 2 no such experiment.
"""

from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli
from deepseek_sft.report import collect, status


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("results", type=Path, nargs="?", help="results/<experiment>; the one active last if not given")
    parser.add_argument("--logs", type=Path, help="folder of the experiment's logs; found beside RESULTS if not given")
    arguments = parser.parse_args()
    results = arguments.results or status.newest_experiment(Path("results"), Path("logs"))
    print(status.screen(results, arguments.logs or collect.default_logs(results)))


if __name__ == "__main__":
    cli.run(main)
