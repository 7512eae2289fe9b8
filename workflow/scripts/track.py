"""Give an experiment's run to MLflow and Weights & Biases, as `tracking:` of its configuration says: metrics by step,
settings, figures of the receipts. No path, host or text of the data.

    make track RESULTS=results/mine      also while it trains, and again at any time

Reads files alone; training knows nothing of it. MLflow gets the steps that it does not have yet. For Weights & Biases a
folder is written that `wandb sync` sends, whole each time and under the run's own id.

Exit codes: 0 done; 2 no run yet, no `tracking:`, or a server that does not take it.
"""

from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli
from deepseek_sft.errors import BadInputError
from deepseek_sft.report import collect, tracked, trackers
from deepseek_sft.report.collect import mapping


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("results", metavar="RESULTS", type=Path, help="folder of the experiment, results/<experiment>")
    results = parser.parse_args().results
    chosen = mapping(collect.config(results).get("tracking"))
    if not chosen.get("mlflow") and not chosen.get("wandb"):
        raise BadInputError(
            f"the configuration of {results} names no tracker",
            "write tracking: {mlflow: {}} or tracking: {wandb: {}} in it, and start Snakemake once, a dry run excepted",
        )
    found = tracked.of(results)
    if found is None:
        raise BadInputError(f"{results}: training has not logged a step yet", "wait for its first step")
    if options := chosen.get("mlflow"):
        cli.say(trackers.mlflow(found, mapping(options), results / "tracking"))
    if options := chosen.get("wandb"):
        cli.say(trackers.wandb(found, mapping(options), results / "tracking"))


if __name__ == "__main__":
    cli.run(main)
