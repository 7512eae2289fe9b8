"""Settings of the evaluation: section ``evaluate`` of the configuration, and what it is asked of."""

from typing import Any

from .evaluate import Evaluate
from .field_types import Text, plain, section, setting


@section
class ServedEvaluation(Evaluate):
    """The section ``evaluate`` as the stages get it."""

    python: Text = ".envs/evaluate/bin/python"
    """Interpreter of the environment with lm-eval."""
    template: Text = ""
    """Training's template."""
    served: dict[str, Any] = setting({})
    """Settings of the deployment that shape answers."""

    @property
    def by_name(self) -> dict[str, dict[str, Any]]:
        """Settings of each task."""
        return plain(self)["tasks"]
