"""INT4 bases: our values are those of the library that made them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.stage("serve-cpu")


def test_dequantised_values_are_the_librarys_bit_for_bit(environment, project):
    result = subprocess.run(
        [str(environment("serve-cpu")), str(Path(__file__).with_name("int4_probe.py"))],
        env=os.environ | {"PYTHONPATH": str(project / "workflow")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    different = json.loads(result.stdout.splitlines()[-1])
    assert len(different) == 3 and not any(different.values())
