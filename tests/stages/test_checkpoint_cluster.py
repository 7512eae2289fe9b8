"""One conversion on three nodes of the emulated cluster, in a job as the workflow's; about 10 s."""

import json
import sys
from pathlib import Path

import cluster_fixture
import conversion_helpers
import pytest
import small_models
from cluster_fixture import Cluster

pytestmark = [pytest.mark.stage("workflow"), pytest.mark.cluster]
cluster = cluster_fixture.cluster


def test_three_nodes_write_a_share_each_and_the_model_is_that_of_one_node(cluster: Cluster, project: Path) -> None:
    folder = conversion_helpers.write_inputs(cluster.folder / "made")
    conversion_helpers.convert_all(folder, folder / "alone")
    words = [
        *(sys.executable, project / "workflow/scripts/convert_checkpoint.py", "--nodes=3", "--max-shard-size=20kB"),
        *(f"--checkpoint={folder / 'step'}", f"--base={folder / 'base'}"),
        *(f"--output={folder / 'model'}", f"--receipt={folder / 'receipt.json'}"),
    ]
    job = ["--wait", "--nodes=3", "--ntasks=3", "--mem=1000", f"--output={folder / 'log'}", f"--error={folder / 'log'}"]
    done = cluster.exec("sbatch", *job, "--wrap", " ".join(map(str, words)), check=False)
    log = (folder / "log").read_text()
    assert done.returncode == 0, log
    assert all(f"{k - 1}: part {k}/3 is complete" in log for k in (1, 2, 3))
    assert json.loads((folder / "receipt.json").read_text())["figures"]["nodes"] == 3
    assert small_models.contents(folder / "model") == small_models.contents(folder / "alone")
