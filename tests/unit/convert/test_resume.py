"""What a rank reads of a checkpoint to train on: all of it is described, nothing damaged or foreign is believed."""

import json
import shutil

import numpy as np
import pytest
import stored_checkpoint as stored

from deepseek_sft.convert import rank_state
from deepseek_sft.errors import BadInputError
from deepseek_sft.training import checkpoints

RUN_ID = stored.EXPECTED["run_id"]


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(stored.STORED / f"step_{stored.STEP}", tmp_path / f"step_{stored.STEP}")


def marker_of(folder):
    return json.loads((folder / "committed.json").read_text())


def read_all(folder, marker=None) -> list[str]:
    """What resuming would say is wrong: every rank reads its part, then all ranges are judged together."""
    problems, ranges = [], {}
    for rank in range(stored.RANKS):
        with rank_state.RecordingFiles() as opened:
            try:
                state = rank_state.read(folder, rank, marker or marker_of(folder))
                parts = [*state.flat, *(t for kept in state.moments for t in kept.values()), *state.buffers.values()]
                for part in parts:
                    opened.read(part.file, part.offset, np.uint8, part.bytes)
            except BadInputError as error:
                problems.append(str(error))
            for name, some in opened.ranges().items():
                ranges.setdefault(name, []).extend(some)
    return problems + rank_state.check_ranges(folder, ranges, sorted(ranges))[2]


def test_a_sound_checkpoint_is_described_in_full(folder):
    assert read_all(folder) == []
    state = rank_state.read(folder, 1, marker_of(folder))
    assert [flat.spec.elements for flat in state.flat] == [15808]
    assert [sorted(kept) for kept in state.moments] == [["exp_avg", "exp_avg_sq"]]
    assert (state.optimizer_steps, state.step_is_tensor, state.global_steps, state.global_samples) == ([3], True, 3, 12)
    assert state.hyperparameters[0]["weight_decay"] == 0.1
    assert list(state.buffers) == ["llm.model.layers.1.mlp.gate.e_score_correction_bias"]


def test_ranges_of_several_ranks_are_judged_together(folder):
    """Two ranks of another topology each read a half of one file."""
    state = rank_state.read(folder, 0, marker_of(folder))
    flat, ranges = state.flat[0], {}
    for first, count in ((0, 5000), (5000, flat.bytes - 5000)):
        with rank_state.RecordingFiles() as opened:
            opened.read(flat.file, flat.offset + first, np.uint8, count)
            for name, some in opened.ranges().items():
                ranges.setdefault(name, []).extend(some)
    assert rank_state.check_ranges(folder, ranges, [flat.file.name]) == (1, 0, [])
    halves = {name: some[:1] for name, some in ranges.items()}
    assert rank_state.check_ranges(folder, halves, [flat.file.name])[:2] == (0, 1), "a part alone proves nothing"


DAMAGES = {
    "a bit of the master weights": lambda f: stored.flip(stored.optimizer(f, 0), -1),
    "a bit of the first moments": lambda f: stored.flip(stored.optimizer(f, 1), -2),
    "a bit of the second moments": lambda f: stored.flip(stored.optimizer(f, 1), -3),
    "a bit of the router biases": lambda f: stored.flip(stored.model(f, 0), -1),
    "the last byte": lambda f: stored.flip(stored.optimizer(f, 0), -1, 1.0),
    "a lost page": lambda f: stored.lose_page(stored.optimizer(f, 0)),
    "a cut file": lambda f: stored.optimizer(f, 1).write_bytes(stored.optimizer(f, 1).read_bytes()[:-7]),
    "an empty file": lambda f: stored.model(f, 1).write_bytes(b""),
    "exchanged optimizer files": lambda f: stored.exchange(stored.optimizer(f, 0), stored.optimizer(f, 1)),
    "exchanged model files": lambda f: stored.exchange(stored.model(f, 0), stored.model(f, 1)),
    "a missing file": lambda f: stored.optimizer(f, 1).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_by_its_file(folder, damage):
    DAMAGES[damage](folder)
    problems = read_all(folder)
    assert problems and str(folder) in problems[0] and "_states.pt" in problems[0], problems


def test_nothing_that_a_file_asks_for_is_run(folder, tmp_path):
    for file in (stored.optimizer(folder, 0), stored.model(folder, 1)):
        stored.plant_gadget(file, tmp_path / "canary")
    assert len([problem for problem in read_all(folder) if "is refused: it asks for" in problem]) == 2
    assert not (tmp_path / "canary").exists()


def test_files_of_another_step_or_number_of_ranks_are_refused(folder):
    (problem, *_) = read_all(folder, marker_of(folder) | {"step": 6})
    assert "is of step 3, the checkpoint's marker says 6" in problem
    (problem, *_) = read_all(folder, marker_of(folder) | {"world_size": 3})
    assert "of 3 ranks the optim_states file of 1 is missing" in problem


def test_a_file_with_other_content_than_was_committed_is_refused_though_it_is_whole(folder):
    """Two checkpoints of one run, sizes and checksums right in themselves: only the marker's checksum tells."""
    names = [path.name for path in folder.glob("*_states.pt")]
    marker = marker_of(folder) | {"checksums": rank_state.digests_of(folder, names)}
    assert read_all(folder, marker) == []
    marker["checksums"][stored.optimizer(folder, 1).name] = marker["checksums"][stored.optimizer(folder, 0).name]
    (problem,) = read_all(folder, marker)
    assert "is not the file that was committed" in problem


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "{",
        "[" * 100_000,
        '{"format": 1}',
        *(
            {"files": []},
            {"step": "3"},
            {"step": True},
            {"progress": None},
            {"world_size": 0},
            {"files": {"a": "1"}},
            {"run_id": 7},
            {"checksums": [1]},
            {"format": 2},
        ),
    ],
)
def test_a_marker_that_was_edited_or_torn_counts_as_none(folder, content):
    path = folder / "committed.json"
    path.write_text(content if isinstance(content, str) else json.dumps(marker_of(folder) | content))
    assert isinstance(checkpoints.judge(folder, RUN_ID), checkpoints.NotCommitted)
    assert checkpoints.committed(folder.parent, RUN_ID) == []


def test_a_damaged_checkpoint_stays_until_training_has_come_as_far_again(folder):
    run = folder.parent
    aside = checkpoints.set_aside_damaged(folder)
    assert aside.name == "step_3.damaged"

    def commit(step):
        shutil.copytree(aside, run / f"step_{step}")
        stored.change_marker(run / f"step_{step}", lambda marker: marker.update(step=step))
        checkpoints.prune(run, RUN_ID, keep=2)

    commit(2)
    assert aside.exists()
    commit(4)
    assert not aside.exists()
