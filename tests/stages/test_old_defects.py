"""Defects of an earlier system that only a training environment shows; the others are in tests/unit."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from training_inputs import make_inputs

pytestmark = pytest.mark.stage("train")
STAGES = Path(__file__).resolve().parent
TOLERANCE = {"rotary_precision": 1e-3, "share_read": 0.01}


@pytest.fixture(scope="module")
def figures(environment, project, tmp_path_factory):
    base = make_inputs(tmp_path_factory.mktemp("inputs")) / "base"
    command = [str(environment("train")), str(STAGES / "defects_probe.py"), str(base)]
    variables = os.environ | {"PYTHONPATH": str(project / "workflow")}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("defect", "meaning"),
    [
        ("routed_scaling", "the scaling factor of the experts' weights was dropped where they are normalised"),
        ("yarn", "YaRN was replaced by a linear scaling of factor 1"),
        ("rotary_precision", "positions above 256 were rounded to bf16"),
        ("split_targets", "labels were split over ranks before the shift, and the parts' means weighed alike"),
        ("correction_bias", "the router's bias was a bf16 parameter"),
        ("balance_loss", "the balance loss took scores that were not normalised, and crashed at weight 0"),
        ("learning_rate", "in short runs the warm-up never ended, at a hundred-thousandth of the rate"),
        ("share_read", "every rank read every file of the release"),
    ],
)
def test_a_defect_of_the_old_system_stays_away(figures, defect, meaning):
    values = figures[defect]
    right = pytest.approx(values["right"], rel=TOLERANCE.get(defect, 1e-5), abs=TOLERANCE.get(defect, 1e-6))
    assert values["ours"] == right, meaning
    assert values["old"] != right, "the old behaviour would pass this test"
