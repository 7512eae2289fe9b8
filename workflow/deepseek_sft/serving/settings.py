"""Settings of the serving stage, read from ``settings.json``: section ``serve`` with ``smoke_test`` inside.

The keys stand in ``settings/serve.py`` and ``settings/smoke_test.py``; a file that was written by hand is checked as
the configuration is.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ..errors import BadInputError
from ..settings import reading
from ..settings.field_types import Positive, section
from ..settings.serve import Serve
from ..settings.served_evaluation import ServedEvaluation
from ..settings.smoke_settings import SmokeSettings


@section
class ServeSettings(Serve):
    """Settings of a deployment."""

    tensor_parallel_size: Positive = 1
    """GPUs that share each layer; a file written by hand that does not say it means one process."""
    pipeline_parallel_size: Positive = 1
    """Groups of layers."""
    smoke_test: SmokeSettings = SmokeSettings()
    """Of its test."""
    evaluation: ServedEvaluation | None = None
    """Tasks that the served model is asked."""

    @property
    def lasting(self) -> "ServeSettings":
        """Settings of a deployment that is not tested: with its own flags."""
        return dataclasses.replace(self, engine_args=self.deployment_flags, deployment_engine_args={})

    def local_world_size(self, nodes: int) -> int:
        """Processes of a node that hold a part of the model.

        Raises:
            BadInputError: they cannot be spread evenly.
        """
        if self.splits(nodes):
            return self.ranks // nodes
        if self.ranks % nodes:
            raise BadInputError(
                f"serve: {self.sizes} processes do not spread evenly over {nodes} nodes",
                "change these sizes, or `nodes` of the rule smoke_test in the profile, so that it divides the product",
            )
        raise BadInputError(
            f"serve: {self.sizes}: {self.ranks // nodes} processes a node hold no whole number of replicas of "
            f"{self.ranks_per_replica}, nor a replica whole nodes",
            "change these sizes, or `nodes` of the rule smoke_test in the profile",
        )


def read(path: Path) -> ServeSettings:
    """Read and check ``settings.json``.

    Raises:
        BadInputError: unreadable, an unknown key, a wrong type or an impossible value; names the file and the key.
    """
    return reading.read(ServeSettings, path)


def parse(value: Any, where: str = "settings") -> ServeSettings:
    """Turn the JSON value of a settings file into settings; see ``read``."""
    return reading.parse(ServeSettings, value, where)
