"""Which experiment trackers are given a run, from its files: `make track`."""

from .field_types import Named, Text, section


@section
class MLflow:
    uri: Text | None = None
    """Tracking server, such as `https://mlflow.example.org`, or `sqlite:////path/to/mlflow.db`; null writes
    `tracking/mlflow.db` in the experiment's folder."""
    experiment: Named = "deepseek-sft"
    """Name of MLflow's experiment."""


@section
class WandB:
    project: Named = "deepseek-sft"
    """Project that the files name; `wandb sync` sends them."""
    entity: Text | None = None
    """User or team."""


@section
class Tracking:
    mlflow: MLflow | None = None
    """Give runs to MLflow, `{}` for the defaults."""
    wandb: WandB | None = None
    """Write runs as offline files of Weights & Biases, `{}` for the defaults."""
