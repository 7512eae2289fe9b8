"""Several nodes write one model: shares are complete and even, they do not meet, and one run completes the folder."""

import fcntl
import json
import os
import subprocess
import sys
import threading

import pytest
import small_models
from conversion_helpers import convert_all, write_inputs
from hypothesis import given
from hypothesis import strategies as st

from deepseek_sft.errors import BadInputError, CrashError, StoppedError
from deepseek_sft.tensors import node_shares, progress_folder, shard_writer
from deepseek_sft.tensors.node_shares import Part
from deepseek_sft.tensors.progress_folder import Finished, ProgressFolder
from deepseek_sft.tensors.safetensors_files import Shard


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("parts"))


def shards_of(sizes):
    return [Shard(f"model-{i}.safetensors", b"", {}, size) for i, size in enumerate(sizes)]


@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=60), st.integers(1, 40))
def test_every_file_is_in_one_share_and_shares_are_even_to_a_file(sizes, count):
    shards = shards_of(sizes)
    shares = [node_shares.share(shards, Part(k, count)) for k in range(1, count + 1)]
    assert [shard for share in shares for shard in share] == shards
    for share in shares:
        assert abs(sum(s.size for s in share) - sum(sizes) / count) <= max(sizes)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/2"])
def test_impossible_share_is_refused(text):
    with pytest.raises(BadInputError, match="--part"):
        node_shares.parse_part(text)


def test_share_is_taken_from_srun_or_a_job_array(monkeypatch):
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadInputError, match="SLURM_PROCID"):
        node_shares.parse_part("slurm")
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert node_shares.parse_part("slurm") == Part(3, 4)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    for name, value in (("ID", "5"), ("MIN", "1"), ("MAX", "8"), ("COUNT", "8")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert node_shares.parse_part("slurm") == Part(5, 8)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    with pytest.raises(BadInputError, match="gaps"):
        node_shares.parse_part("slurm")


def assert_same_weights(found, expected):
    found, expected = small_models.contents(found), small_models.contents(expected)
    assert found == expected


def test_shares_at_the_same_time_and_then_the_whole_give_the_same_bytes(tmp_path, inputs):
    convert_all(inputs, tmp_path / "whole")
    failures = []

    def convert_part(k):
        try:
            convert_all(inputs, tmp_path / "model", part=Part(k, 3))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=convert_part, args=(k,)) for k in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not (tmp_path / "model").exists()
    _, (progress, bytes_read, _) = convert_all(inputs, tmp_path / "model")
    assert progress.written == 0 and bytes_read == 0 and progress.kept == len(progress.done)
    assert progress.figures["records_checked"] > 0  # by the ranges that the shares noted
    assert_same_weights(tmp_path / "model", tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "whole"]


def test_missing_share_is_written_by_the_completing_run(tmp_path, inputs):
    convert_all(inputs, tmp_path / "whole")
    convert_all(inputs, tmp_path / "model", part=Part(2, 2))
    _, (progress, _, _) = convert_all(inputs, tmp_path / "model")
    assert 0 < progress.kept < len(progress.done)
    assert_same_weights(tmp_path / "model", tmp_path / "whole")


def test_other_division_continues_what_another_began(tmp_path, inputs):
    convert_all(inputs, tmp_path / "model", part=Part(1, 2))
    _, (progress, _, _) = convert_all(inputs, tmp_path / "model", part=Part(1, 3))
    assert progress.written == 0


def test_whole_run_is_refused_while_a_share_is_written(tmp_path, inputs):
    conversion, _ = convert_all(inputs, tmp_path / "model", part=Part(1, 2))
    folder = ProgressFolder(tmp_path / "model", conversion.plan.identity)
    with folder.locked(shared=True, replace=False), pytest.raises(BadInputError, match="another process"):
        convert_all(inputs, tmp_path / "model")


def test_same_share_twice_is_refused_at_the_file(tmp_path):
    (shard,) = shards_of([100])
    first = shard_writer.OpenShard(tmp_path, shard)
    with pytest.raises(BadInputError, match="another process is writing"):
        shard_writer.OpenShard(tmp_path, shard)
    first.close()


@pytest.mark.parametrize("found", ["replaced", "gone"])
def test_file_that_another_process_took_over_never_gets_its_final_name(tmp_path, monkeypatch, found):
    monkeypatch.setattr(shard_writer.fcntl, "flock", lambda *_: None)  # a file system without locks
    (shard,) = shards_of([100])
    first = shard_writer.OpenShard(tmp_path, shard)
    first.part.unlink()
    if found == "replaced":
        first.part.write_bytes(b"half written")
    with pytest.raises(BadInputError, match="another process is writing"):
        first.publish()
    assert not first.final.exists()
    first.close()


def test_file_taken_over_before_it_is_locked_is_refused_untouched(tmp_path, monkeypatch):
    (shard,) = shards_of([100])
    part = tmp_path / f"{shard.name}.part"

    def flock(*_):
        part.unlink()
        part.write_bytes(b"the other's")

    monkeypatch.setattr(shard_writer.fcntl, "flock", flock)
    with pytest.raises(BadInputError, match="another process is writing"):
        shard_writer.OpenShard(tmp_path, shard)
    assert part.read_bytes() == b"the other's"


@pytest.mark.parametrize("shared", [True, False])
def test_folder_is_locked_through_a_descriptor_for_reading_and_writing(tmp_path, monkeypatch, shared):
    modes, real = [], progress_folder.fcntl.flock

    def flock(descriptor, operation):
        modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        real(descriptor, operation)

    monkeypatch.setattr(progress_folder.fcntl, "flock", flock)
    with ProgressFolder(tmp_path / "model", {}).locked(shared=shared, replace=False):
        pass
    assert set(modes) == {os.O_RDWR}  # NFS refuses either lock on anything less


def test_file_finished_from_other_inputs_does_not_count(tmp_path):
    (shard,) = shards_of([3])
    for identity in ({"step": 1}, {"step": 2}):
        folder = ProgressFolder(tmp_path / "model", identity)
        with folder.locked(shared=True, replace=True):
            assert folder.finished(shard) is None
            (folder.incomplete / shard.name).write_bytes(b"abc")
            folder.finish(shard, Finished({}, None))
            assert folder.finished(shard) == Finished({}, None)


def test_shares_of_other_inputs_are_refused_with_the_reason(tmp_path, inputs):
    convert_all(inputs, tmp_path / "model", part=Part(1, 2))
    with pytest.raises(BadInputError, match="dtype was 'bf16', is 'fp32'"):
        convert_all(inputs, tmp_path / "model", part=Part(2, 2), dtype="fp32")


# srun as the rule uses it: every task gets its number, and the worst exit code comes back
SRUN = """#!{python}
import os, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--")]
nodes = int(next(o for o in options if o.startswith("--nodes=")).split("=")[1])
assert set(n for n in os.environ if n.startswith("SLURM_")) == {{"SLURM_JOB_ID"}}, os.environ
command = sys.argv[1 + next(i for i, w in enumerate(sys.argv[1:]) if not w.startswith("--")):]
tasks = [subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(k), "SLURM_NTASKS": str(nodes)}})
         for k in range(nodes)]
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    launcher = tmp_path / "bin/srun"
    launcher.parent.mkdir()
    launcher.write_text(SRUN.format(python=sys.executable))
    launcher.chmod(0o755)
    monkeypatch.setenv("PATH", f"{launcher.parent}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "1")


def test_rule_on_several_nodes_scatters_and_completes(tmp_path, project, inputs, slurm):
    script = project / "workflow/scripts/convert_checkpoint.py"
    arguments = [f"--checkpoint={inputs / 'step'}", f"--base={inputs / 'base'}", "--max-shard-size=20kB"]
    arguments += [f"--output={tmp_path / 'model'}", f"--receipt={tmp_path / 'receipt.json'}", "--nodes=3"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"part {k}/3 is complete" in done.stderr for k in (1, 2, 3))
    figures = json.loads((tmp_path / "receipt.json").read_text())["figures"]
    assert figures["nodes"] == 3 and figures["files_kept_from_earlier_run"] == 0
    assert figures["bytes_written"] == figures["bytes"] and figures["bytes_read"] > figures["bytes"]


def test_retry_on_several_nodes_tells_its_own_work_and_the_size_of_the_model(tmp_path, project, inputs, slurm):
    conversion, (begun, _, _) = convert_all(inputs, tmp_path / "model", part=Part(2, 3))
    script = project / "workflow/scripts/convert_checkpoint.py"
    arguments = [f"--checkpoint={inputs / 'step'}", f"--base={inputs / 'base'}", "--max-shard-size=20kB"]
    arguments += [f"--output={tmp_path / 'model'}", f"--receipt={tmp_path / 'receipt.json'}", "--nodes=3"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "receipt.json").read_text())["figures"]
    assert figures["files_kept_from_earlier_run"] == len(begun.done) > 0
    assert figures["bytes"] == conversion.bytes_to_write
    assert figures["bytes_written"] == conversion.bytes_to_write - begun.written
    assert 0 < figures["bytes_read"] < conversion.bytes_to_read


@pytest.mark.parametrize("code, kind", [(2, BadInputError), (4, StoppedError), (1, CrashError), (137, CrashError)])
def test_exit_code_of_the_worst_node_comes_through(slurm, code, kind):
    with pytest.raises(kind, match=f"exit code {code}"):
        node_shares.run_on_nodes(2, ["-c", f"import sys; sys.exit({code})"])


def test_several_nodes_without_slurm_are_refused(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(BadInputError, match="not a Slurm job"):
        node_shares.run_on_nodes(2, ["-c", ""])
