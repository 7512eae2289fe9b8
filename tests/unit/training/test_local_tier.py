"""Promises of checkpoints on the nodes' own disks: which is gone on from, whatever nodes hold, and what stays."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import settings as make_settings
from training_helpers import write_checkpoint

from deepseek_sft import saving_tiers
from deepseek_sft.engines import MARKER
from deepseek_sft.errors import BadInputError
from deepseek_sft.settings import reading
from deepseek_sft.settings.train import Training
from deepseek_sft.training import local_tier
from deepseek_sft.training.local_tier import Damaged, Held, NotUsableError

NODES, EACH = 4, 2
WORLD = NODES * EACH
KINDS = [("a", 10), ("b", 10), ("c", 20), ("d", 30)]  # digest and step of checkpoints that may lie about

TEMPLATES = Path(__file__).resolve().parents[3] / "workflow/templates"


def held(step: int, digest: str, ranks, topology: str = "t") -> Held:
    return Held(step, digest, topology, WORLD, tuple(f"n{i}" for i in range(NODES)), frozenset(ranks))


@st.composite
def what_nodes_hold(draw) -> list[list[Held]]:
    """Any ranks' files of any checkpoints on any nodes."""
    ranks = st.frozensets(st.integers(0, WORLD - 1))
    return [[held(step, digest, draw(ranks)) for digest, step in KINDS if draw(st.booleans())] for _ in range(NODES)]


@st.composite
def after_saves(draw) -> list[list[Held]]:
    """What saves leave (own files, and the node's before), nodes in another order, some of them empty."""
    steps = draw(st.lists(st.sampled_from(KINDS), unique_by=lambda kind: kind[1]))
    own = [{*range(n * EACH, (n + 1) * EACH)} for n in range(NODES)]
    nodes = [[held(step, digest, own[n] | own[n - 1]) for digest, step in steps] for n in range(NODES)]
    lost = draw(st.sets(st.integers(0, NODES - 1)))
    order = draw(st.permutations(range(NODES)))
    return [[] if n in lost else nodes[n] for n in order]


@given(
    told=what_nodes_hold() | after_saves(),
    damaged=st.sets(st.builds(Damaged, st.integers(0, 3), st.sampled_from("abcd"), st.integers(0, 7))),
)
@settings(max_examples=120, deadline=None)
def test_the_newest_checkpoint_is_taken_of_which_every_rank_is_somewhere_and_never_a_mixture(told, damaged):
    def whole(digest: str) -> bool:
        there = {
            r
            for n, node in enumerate(told)
            for one in node
            if one.digest == digest
            for r in one.ranks
            if Damaged(n, digest, r) not in damaged
        }
        return there == set(range(WORLD))

    found = local_tier.choices(told, EACH, "t", damaged)
    assert sorted(one.digest for one in found) == sorted(d for d, _ in KINDS if whole(d))
    assert [one.step for one in found] == sorted(one.step for one in found)
    for one in found:
        has = [
            {r for h in node if h.digest == one.digest for r in h.ranks if Damaged(n, one.digest, r) not in damaged}
            for n, node in enumerate(told)
        ]
        assert any(h.digest == one.digest for h in told[one.marked])
        for move in one.moves:
            assert move.rank in has[move.giver] and move.rank not in has[move.taker]
            has[move.taker].add(move.rank)
        assert all(rank in has[rank // EACH] for rank in range(WORLD))
    refused = local_tier.refused(told, "t", WORLD, damaged)
    lost = {step for digest, step in KINDS if any(h.digest == digest for n in told for h in n) and not whole(digest)}
    assert refused.keys() == lost


@given(told=after_saves())
@settings(max_examples=60, deadline=None)
def test_one_lost_node_loses_nothing_and_neighbours_that_are_lost_together_do(told):
    empty = sum(not node for node in told)
    kinds = {one.digest for node in told for one in node}
    if empty <= 1:
        assert {one.digest for one in local_tier.choices(told, EACH, "t")} == kinds
    if empty == NODES:
        assert not local_tier.choices(told, EACH, "t")


def test_files_of_ranks_of_another_kind_are_not_read_and_both_numbers_are_named():
    told = [[held(10, "a", range(WORLD), topology="other")]] * NODES
    assert not local_tier.choices(told, EACH, "t")
    text = local_tier.refused(told, "t", 16)[10]
    assert "step_10 is of 8 ranks, this start has 16" in text and "only the shared storage's" in text


def test_what_is_lost_is_named_by_step_ranks_and_the_nodes_that_wrote_them():
    told = [[held(10, "a", {0, 1, 2, 3})], [held(10, "a", {2, 3})], [], []]
    text = local_tier.refused(told, "t", WORLD)[10]
    assert "step_10 is lost" in text and "rank 4, 5, 6, 7, which n2 and n3 wrote," in text


# --------------------------------------------------------------------------------------------------------- on a disk


@pytest.fixture
def root(tmp_path):
    place = tmp_path / "abc-key"
    local_tier.open_root(place, 0, "now")
    return place


def test_a_node_holds_the_ranks_whose_files_are_there_in_their_sizes(root):
    folder = write_checkpoint(root, 5, world_size=4)
    (one,) = local_tier.held(root, "abc")
    assert (one.step, one.ranks) == (5, {0, 1, 2, 3})
    next(folder.glob("*rank_1_*optim*")).unlink()
    next(folder.glob("*rank_3_*model*")).write_bytes(b"torn")
    assert local_tier.held(root, "abc")[0].ranks == {0, 2}
    assert local_tier.held(root, "another run") == []


def test_two_checkpoints_of_one_step_are_not_taken_for_one(root, tmp_path):
    for place, attempt in ((root, "first"), (tmp_path / "b", "second")):
        folder = write_checkpoint(place, 5)
        marker = json.loads((folder / MARKER).read_text())
        (folder / MARKER).write_text(json.dumps(marker | {"saved_by": attempt}))
    first, second = (local_tier.held(place, "abc")[0] for place in (root, tmp_path / "b"))
    assert first.step == second.step and first.digest != second.digest


def test_older_ones_and_those_of_a_course_that_was_given_up_go_once_a_newer_is_committed(root):
    for step in (2, 4, 6, 30):
        write_checkpoint(root, step)
    (root / "step_4.damaged").mkdir()
    local_tier.prune(root, step=6, keep=2)
    assert sorted(path.name for path in root.glob("step_*")) == ["step_4", "step_6"]


def test_what_was_never_committed_goes_when_a_start_opens_the_folder(root):
    write_checkpoint(root, 2)
    write_checkpoint(root, 3, commit=False)
    local_tier.open_root(root, 0, "next")
    assert [path.name for path in root.glob("step_*")] == ["step_2"]
    assert [path.name for path in root.glob(".node-*")] == [".node-0-next"], "and signs of killed starts"


def test_a_checkpoint_is_not_begun_without_the_space_for_it(root):
    with pytest.raises(NotUsableError, match=r"GB are free, this checkpoint takes 1000000000\.0"):
        local_tier.begin(root / "step_9", 10**18)
    assert not (root / "step_9").exists()


def test_a_folder_that_others_sign_is_no_nodes_own(root):
    assert local_tier.others_seen(root, 0, "now") == []
    local_tier.open_root(root, 3, "now")
    assert local_tier.others_seen(root, 0, "now") == [3]


def test_a_run_that_is_begun_anew_has_another_folder(tmp_path):
    key = local_tier.key_of(tmp_path)
    assert local_tier.key_of(tmp_path) == key
    (tmp_path / local_tier.KEY).unlink()
    assert local_tier.key_of(tmp_path) != key


def test_a_note_that_is_torn_or_edited_counts_as_none(tmp_path):
    assert local_tier.read_note(tmp_path) == {}
    local_tier.note(tmp_path, 5, 100, 1.0, 2.0)
    assert local_tier.read_note(tmp_path)["step"] == 5
    (tmp_path / local_tier.NOTE).write_text('{"step": "5"')
    assert local_tier.read_note(tmp_path) == {}
    (tmp_path / local_tier.NOTE).write_text('{"step": "5", "bytes": 1, "time": 2.0}')
    assert local_tier.read_note(tmp_path) == {}


def test_only_steps_that_no_start_has_come_to_are_progress(tmp_path):
    """What `train.sbatch` counts attempts by: the time of this file."""
    seen = []
    for step in (5, 10, 5, 10, 11):
        local_tier.note(tmp_path, step, 100, 1.0, 2.0)
        file = tmp_path / local_tier.FURTHEST
        seen.append((json.loads(file.read_text())["step"], file.stat().st_mtime_ns))
    assert [step for step, _ in seen] == [5, 10, 10, 10, 11]
    assert seen[1] == seen[2] == seen[3]
    assert local_tier.FURTHEST in (TEMPLATES / "train.sbatch.j2").read_text()


@pytest.mark.parametrize("path", ["$NONE/x", "${NONE}", "$RELATIVE/x"])
def test_a_path_that_a_node_does_not_have_is_named(path):
    with pytest.raises(NotUsableError, match=r"variable NONE is not set|not begin with /"):
        local_tier.root_of(path, "id", "key", {"RELATIVE": "a/b"})


def test_variables_of_a_path_are_the_nodes_own():
    assert local_tier.root_of("/local/$NODE/${WHO}", "id", "key", {"NODE": "n1", "WHO": "me"}) == Path(
        "/local/n1/me/id-key"
    )


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("tiers", "said"),
    [
        ([{"path": "/local", "every_minutes": 5}], "exactly one entry must have no path"),
        ([{"path": "/a", "every_minutes": 5}, {"path": "/b", "every_minutes": 5}, {}], "'/b' is the second folder"),
        ([{"path": "/a"}, {}], "say every_minutes for the nodes' own disks"),
        ([{"path": "local", "every_minutes": 5}, {}], "a path that begins with /"),
        ([{"path": "/a; rm -rf /", "every_minutes": 5}, {}], "a path that begins with /"),
        ([{"path": "/a", "every_minutes": 0}, {}], "above 0"),
        ([{"path": "/a", "minutes": 5}, {}], "did you mean `every_minutes`"),
    ],
)
def test_what_is_wrong_with_the_folders_is_said(tiers, said):
    with pytest.raises(BadInputError) as raised:
        reading.parse(Training, {"checkpoints": tiers}, "settings")
    assert said in raised.value.problem


def test_the_shared_storages_entry_stands_before_the_keys_of_one_folder():
    chosen = make_settings(save_every_minutes=60, keep_checkpoints=3)
    assert (saving_tiers.shared_seconds(chosen), saving_tiers.shared_keep(chosen)) == (3600, 3)
    assert saving_tiers.local(chosen) is None
    own = {"path": "/a", "every_minutes": 5}
    chosen = make_settings(
        save_every_minutes=60, keep_checkpoints=3, checkpoints=[own, {"every_minutes": 240, "keep": 1}]
    )
    assert (saving_tiers.shared_seconds(chosen), saving_tiers.shared_keep(chosen)) == (14400, 1)
    assert (saving_tiers.local(chosen).path, saving_tiers.local_seconds(chosen)) == ("/a", 300)
