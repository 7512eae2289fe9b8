"""Experiment trackers, by their own libraries, which the environment ``track`` has alone."""

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..errors import BadInputError
from .tracked import Tracked

RUN_TAG = "deepseek_sft.run_id"
DATABASE, FOLDER = "mlflow.db", "wandb"
AT_ONCE, SETTINGS_AT_ONCE = 1000, 100  # of a request to MLflow's server, which takes no more


def mlflow(run: Tracked, options: dict[str, Any], folder: Path) -> str:
    """Log what the server does not have yet, or write a database anew in ``folder``; says where it is.

    Raises:
        BadInputError: the server does not take it.
    """
    uri = options.get("uri")
    if uri:
        return _to_mlflow(run, uri, options["experiment"])
    folder.mkdir(parents=True, exist_ok=True)
    # SQLite's locks do not work on every shared file system: it is written on this machine's own disk and moved.
    with tempfile.TemporaryDirectory() as own:
        made = Path(own, DATABASE)
        _to_mlflow(run, f"sqlite:///{made}", options["experiment"])
        beside = folder / f".{DATABASE}.new"
        shutil.copyfile(made, beside)
        beside.replace(folder / DATABASE)
    return f"MLflow: {len(run.steps):,} steps in {folder / DATABASE} (mlflow server --backend-store-uri sqlite:///…)"


def _to_mlflow(run: Tracked, uri: str, experiment: str) -> str:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else client.create_experiment(experiment)
        there = client.search_runs([number], f"tags.`{RUN_TAG}` = '{run.run_id}'", max_results=1)
        if there:
            (made,) = there
        else:
            begun = int(run.steps[0][1] * 1000)
            made = client.create_run(number, begun, {RUN_TAG: run.run_id}, run_name=run.name)
        name, has = made.info.run_id, made.data.params
        new = [Param(key, value) for key, value in run.settings.items() if key not in has]
        for start in range(0, len(new), SETTINGS_AT_ONCE):
            client.log_batch(name, params=new[start : start + SETTINGS_AT_ONCE])
        history = client.get_metric_history(name, "seconds") if there else []
        last = max((one.step for one in history), default=0)
        metrics = [
            Metric(key, value, int(at * 1000), step)
            for step, at, values in run.steps
            if step > last
            for key, value in values.items()
        ]
        at = int(run.steps[-1][1] * 1000)
        metrics += [
            Metric(key, value, at, 0) for key, value in run.figures.items() if made.data.metrics.get(key) != value
        ]
        for start in range(0, len(metrics), AT_ONCE):
            client.log_batch(name, metrics=metrics[start : start + AT_ONCE])
        client.set_terminated(name, "FINISHED", at) if run.ended else client.update_run(name, "RUNNING")
    except MlflowException as error:
        raise BadInputError(f"MLflow at {uri} does not take the run: {error}", "mend tracking.mlflow.uri") from None
    return f"MLflow: {sum(step > last for step, _, _ in run.steps):,} new steps at {uri}, run {name}"


def wandb(run: Tracked, options: dict[str, Any], folder: Path) -> str:
    """Write the run's offline files anew in ``folder``; says how they are sent."""
    import wandb as library

    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob(f"{FOLDER}/offline-run-*-{run.run_id}"):
        shutil.rmtree(earlier)
    settings = library.Settings(
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        host="-",
        program="track.py",
        x_disable_meta=True,
        x_save_requirements=False,
        x_disable_stats=True,
        x_disable_machine_info=True,
    )
    made = library.init(
        project=options["project"],
        entity=options.get("entity"),
        id=run.run_id,
        name=run.name,
        mode="offline",
        dir=str(folder),
        config=run.settings,
        settings=settings,
    )
    for step, _, values in run.steps:
        made.log(values, step=step)
    made.summary.update(run.figures)
    made.finish()
    (written,) = folder.glob(f"{FOLDER}/offline-run-*-{run.run_id}")
    return f"Weights & Biases: {len(run.steps):,} steps; to send them: .envs/track/bin/wandb sync {written}"
