"""Promises of checkpoints on the nodes' own disks: a lost node loses no step; only what is whole is gone on from."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from training_inputs import make_inputs, probe_variables

pytestmark = pytest.mark.stage("train")
PROBE = Path(__file__).resolve().parent / "node_local_probe.py"


@pytest.fixture(scope="module")
def starts(environment, project, tmp_path_factory):
    """Name → what each start left, all in one launch."""
    folder, python = tmp_path_factory.mktemp("nodes"), environment("train")
    inputs = make_inputs(tmp_path_factory.mktemp("inputs"))
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    command = [*unshare, str(python), str(PROBE), str(inputs), str(folder)]
    done = subprocess.run(command, env=probe_variables(project, python), capture_output=True, text=True, check=False)
    said = "\n".join(path.read_text()[-3000:] for path in folder.rglob("said"))
    assert done.returncode == 0, done.stderr[-3000:] + said
    return json.loads(done.stdout.splitlines()[-1])


def test_all_nodes_have_the_same_marker(starts):
    found = starts["killed"]
    assert found["nodes"] == [["step_4", "step_5"]] * 4, "step 5 without a marker"
    assert len(found["markers"]) == 1


def test_a_lost_nodes_files_come_from_its_neighbour(starts):
    said = starts["a node lost"]["said"]
    assert "step_4: " in said and "for node1 fetched from node2, checksums are right" in said
    assert "resumed from step_4" in said


def test_a_rank_whose_own_file_is_damaged_takes_the_copy(starts):
    said = starts["own file damaged"]["said"]
    assert "node-local checkpoint step_7 is damaged:" in said
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt: the content of record" in said
    assert "for node0 fetched from node1, checksums are right" in said and "resumed from step_7" in said


def test_a_turned_bit_in_a_copy_is_named_and_the_shared_storages_checkpoint_taken(starts):
    said = starts["copy damaged"]["said"]
    assert "node1: zero_pp_rank_0_mp_rank_00_optim_states.pt is not what was committed" in said
    assert "step_7 is lost: the files zero_pp_rank_R_* of rank 0, which node0 wrote," in said
    assert "resumed from step_6" in said


def test_where_neighbours_are_lost_together_training_goes_on_from_the_shared_storage(starts):
    said = starts["both lost"]["said"]
    assert "step_7 is lost: the files zero_pp_rank_R_* of rank 0, which node0 wrote," in said
    assert "resumed from step_6" in said


def test_after_all_this_each_step_has_the_very_loss_of_the_undisturbed_run(starts):
    """The last start, without `async_save`, has the lines of all before it."""
    assert starts["both lost"]["losses"] == starts["undisturbed"]["losses"]
    assert len(starts["both lost"]["losses"]) == 9


def test_a_finished_run_leaves_nothing_on_the_nodes(starts):
    assert starts["both lost"]["nodes"] == [[]] * 4


def test_ranks_of_another_kind_do_not_begin_anew_over_what_lies_on_the_nodes(starts):
    said = starts["ranks of another kind"]["said"]
    assert "step_7 is of ranks that shared experts otherwise, this start has 4" in said
    assert "all steps would be lost" in said


def test_a_full_disk_is_told_and_training_goes_on_with_nothing_left_of_that_checkpoint(starts):
    found = starts["full disk"]
    assert "node-local checkpoint step_1 is given up" in found["said"]
    assert "node1 (rank 2): " in found["said"] and "No space left on device" in found["said"]
    assert "step 2/4" in found["said"] and found["left"] == [] and found["markers"] == []
    assert "node-local checkpoint step_2 committed" in starts["space again"]["said"]
    assert starts["space again"]["losses"] == starts["undisturbed"]["losses"][:4]


def test_a_folder_that_nodes_share_is_refused(starts):
    assert "is no disk of the nodes' own: node0 sees there what node3 wrote" in starts["no disks of their own"]["said"]


def test_a_single_node_says_that_it_has_no_neighbour_and_reads_its_own_files_back(starts):
    said = starts["a single node"]["said"]
    assert "a single node has no neighbour to keep a copy" in said and "resumed from step_1" in said
