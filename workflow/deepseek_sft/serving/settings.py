"""Settings of the serving stage, read from ``settings.json``: section ``serve`` with ``smoke_test`` inside.

The keys stand in ``settings/serve.py`` and ``settings/smoke_test.py``; a file that was written by hand is checked as
the configuration is.
"""

from pathlib import Path
from typing import Any

from ..errors import BadInputError
from ..settings import reading
from ..settings.field_types import Positive, section
from ..settings.serve import Serve
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

    @property
    def world_size(self) -> int:
        """Processes that hold a part of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def local_world_size(self, nodes: int) -> int:
        """Such processes per node.

        Raises:
            BadInputError: they cannot be spread evenly.
        """
        if self.world_size % nodes:
            raise BadInputError(
                f"serve: tensor_parallel_size {self.tensor_parallel_size} x pipeline_parallel_size "
                f"{self.pipeline_parallel_size} = {self.world_size} processes do not spread evenly over {nodes} nodes",
                "change these two, or `nodes` of the rule smoke_test in the profile, so that nodes divides the product",
            )
        return self.world_size // nodes


def read(path: Path) -> ServeSettings:
    """Read and check ``settings.json``.

    Raises:
        BadInputError: unreadable, an unknown key, a wrong type or an impossible value; names the file and the key.
    """
    return reading.read(ServeSettings, path)


def parse(value: Any, where: str = "settings") -> ServeSettings:
    """Turn the JSON value of a settings file into settings; see ``read``."""
    return reading.parse(ServeSettings, value, where)
