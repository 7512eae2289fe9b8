"""Conversion: what comes out, what is refused, and what a kill or a full disk leaves behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import small_models
import synthetic_zero3

from deepseek_sft.convert import base_model, convert, zero
from deepseek_sft.errors import BadInputError, CrashError
from deepseek_sft.families import deepseek_v3
from deepseek_sft.tensors.progress_folder import ProgressFolder
from deepseek_sft.verify import verify

LEARNING_RATE = 1e-3
BIASES = deepseek_v3.CORRECTION_BIAS


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return small_models.make_base(tmp_path_factory.mktemp("models") / "base")


def write_trained(folder, tensors, world_size=3, largest_group=3000, experts_per_shard=2, prefix="llm.", **options):
    """A checkpoint of ``tensors`` as the training engine leaves it: biases are buffers."""
    fused = synthetic_zero3.fuse(tensors, experts_per_shard, prefix)
    buffers = {name: values for name, values in fused.items() if name.endswith(BIASES)}
    parameters = {name: values for name, values in fused.items() if name not in buffers}
    apart = [parameters]
    if options.get("expert_parallel_size", 1) > 1:  # DeepSpeed puts what other ranks share into sub-groups of its own
        of_experts = {name: values for name, values in parameters.items() if synthetic_zero3.EXPERTS in name}
        apart = [{name: values for name, values in parameters.items() if name not in of_experts}, of_experts]
    groups = [group for one in apart for group in synthetic_zero3.split_groups(one, largest_group)]
    assert len(groups) > 1
    return synthetic_zero3.write_checkpoint(folder, groups, world_size, buffers, **options)


@pytest.fixture(scope="session")
def trained(base):
    return small_models.train(small_models.read_tensors(base), LEARNING_RATE)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, trained):
    return write_trained(tmp_path_factory.mktemp("run") / "step7", trained)


def run(checkpoint, base, output, **options):
    options = {"largest_shard": 20_000, "workers": 2} | options
    opened = zero.open_checkpoint(checkpoint), base_model.open_model(base)
    conversion = convert.prepare(*opened, output, convert.Options(**options))
    return convert.run(conversion)[0]


def assert_model_is(folder, tensors, round_values=True):
    found = small_models.read_tensors(folder)
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        expected = values if name.endswith(BIASES) or not round_values else small_models.rounded(values)
        assert np.array_equal(found[name], expected, equal_nan=True), name


@pytest.mark.parametrize("world_size", [1, 2, 5, 16])
@pytest.mark.parametrize("experts_per_shard", [1, 2, 4])
def test_every_value_arrives_rounded_once_whatever_the_layout(tmp_path, base, trained, world_size, experts_per_shard):
    folder = write_trained(tmp_path / "step", trained, world_size, experts_per_shard=experts_per_shard)
    run(folder, base, tmp_path / "model")
    assert_model_is(tmp_path / "model", trained)


@pytest.mark.parametrize(("ranks", "parallel", "experts_per_shard"), [(64, 8, 4), (256, 64, 1)])
def test_every_value_arrives_rounded_once_from_experts_spread_over_ranks(tmp_path, ranks, parallel, experts_per_shard):
    base = small_models.make_base(tmp_path / "base", routed_experts=64, groups=8, groups_used=4, experts_per_token=4)
    trained = small_models.train(small_models.read_tensors(base), LEARNING_RATE)
    spread = {"experts_per_shard": experts_per_shard, "expert_parallel_size": parallel, "largest_group": 10**9}
    folder = write_trained(tmp_path / "step", trained, ranks, **spread)
    run(folder, base, tmp_path / "model")
    assert_model_is(tmp_path / "model", trained)
    opened = base_model.open_model(base), zero.open_checkpoint(folder)
    result = verify.verify(tmp_path / "model", *opened, full=True)
    assert not [name for name, check in result.checks.items() if check.failures]


def test_experts_that_were_never_fused_are_converted_too(tmp_path, base, trained):
    buffers = {"module." + n: v for n, v in trained.items() if n.endswith(BIASES)}
    parameters = {"module." + n: v for n, v in trained.items() if not n.endswith(BIASES)}
    synthetic_zero3.write_checkpoint(tmp_path / "step", [parameters], 2, buffers)
    run(tmp_path / "step", base, tmp_path / "model")
    assert_model_is(tmp_path / "model", trained)


def test_fp32_output_holds_the_master_weights(tmp_path, base, checkpoint, trained):
    run(checkpoint, base, tmp_path / "model", dtype="fp32")
    assert_model_is(tmp_path / "model", trained, round_values=False)
    assert json.loads((tmp_path / "model/config.json").read_text())["torch_dtype"] == "float32"


def test_small_work_items_give_the_same_bytes(tmp_path, base, checkpoint, monkeypatch):
    run(checkpoint, base, tmp_path / "a")
    monkeypatch.setattr(convert.memory_bound, "LARGEST_CHUNK", 37)
    run(checkpoint, base, tmp_path / "b", workers=5)
    assert small_models.contents(tmp_path / "a") == small_models.contents(tmp_path / "b")


def test_output_is_a_complete_model_folder_in_the_base_order(tmp_path, base, checkpoint):
    run(checkpoint, base, tmp_path / "model", largest_shard=1 << 30)
    model = base_model.open_model(tmp_path / "model")
    assert [path.name for path in model.files] == ["model.safetensors"]
    assert list(model.tensors) == list(base_model.open_model(base).tensors)
    assert (tmp_path / "model/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not (tmp_path / "model.incomplete").exists()


def test_marker_decides_prefix_and_step(tmp_path, base, trained):
    folder = write_trained(tmp_path / "step", trained, prefix="wrapped.model.", step=5)
    with pytest.raises(BadInputError, match="do not have the same tensors"):
        run(folder, base, tmp_path / "model")
    synthetic_zero3.write_marker(folder, 3, step=5, prefix="wrapped.model.")
    run(folder, base, tmp_path / "model")
    assert_model_is(tmp_path / "model", trained)


def test_marker_that_contradicts_the_shards_of_experts_is_refused(tmp_path, base, trained):
    folder = write_trained(tmp_path / "step", trained)
    synthetic_zero3.write_marker(folder, 3, experts_per_shard=4)
    with pytest.raises(BadInputError, match="4 per shard"):
        run(folder, base, tmp_path / "model")


def test_unmarked_checkpoint_is_accepted_and_said_so(tmp_path, base, checkpoint, capsys):
    run(checkpoint, base, tmp_path / "model")
    assert "no commit marker; accepted after checking all 3 ranks' files" in capsys.readouterr().err


def test_checkpoint_of_another_model_is_refused(tmp_path, checkpoint):
    other = small_models.make_base(tmp_path / "other", layers=2)
    with pytest.raises(BadInputError, match=r"unknown, first model\.layers\.2"):
        run(checkpoint, other, tmp_path / "model")
    wider = small_models.make_base(tmp_path / "wider", intermediate_size=48)
    with pytest.raises(BadInputError, match="has shape"):
        run(checkpoint, wider, tmp_path / "model")


def test_non_finite_values_are_counted_by_tensor(tmp_path, base, trained):
    broken = {name: values.copy() for name, values in trained.items()}
    broken["model.norm.weight"][:3] = np.nan
    broken["model.layers.1.mlp.experts.1.up_proj.weight"][2, 2] = np.inf
    progress = run(write_trained(tmp_path / "step", broken), base, tmp_path / "model")
    expected = {"model.norm.weight": 3, "model.layers.1.mlp.experts.1.up_proj.weight": 1}
    assert progress.non_finite == expected
    assert run(tmp_path / "step", base, tmp_path / "model").non_finite == expected


@pytest.mark.parametrize("as_parameter", [False, True])
def test_bias_that_training_only_rounded_is_restored(tmp_path, base, trained, as_parameter, capsys):
    fused = synthetic_zero3.fuse(trained, 2)
    biases = {n: v for n, v in fused.items() if n.endswith(BIASES)}
    parameters = {n: v for n, v in fused.items() if n not in biases}
    if as_parameter:  # the original guide
        parameters |= {name: small_models.rounded(values) for name, values in biases.items()}
        buffers = {}
    else:  # DeepSpeed up to 0.18
        buffers = {n: convert.number_formats.float32_to_bf16(v) for n, v in biases.items()}
    synthetic_zero3.write_checkpoint(tmp_path / "step", [parameters], 2, buffers)
    run(tmp_path / "step", base, tmp_path / "model")
    assert_model_is(tmp_path / "model", trained)
    assert "2 router biases lost precision" in capsys.readouterr().err


def test_bias_that_training_changed_is_kept(tmp_path, base, trained):
    changed = {n: v + 0.5 if n.endswith(BIASES) else v for n, v in trained.items()}
    parameters = synthetic_zero3.fuse(changed, 2)
    synthetic_zero3.write_checkpoint(tmp_path / "step", [parameters], 2)
    run(tmp_path / "step", base, tmp_path / "model")
    assert_model_is(tmp_path / "model", changed)


def test_finished_conversion_is_recognised_and_left_alone(tmp_path, base, checkpoint):
    first = run(checkpoint, base, tmp_path / "model")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()}
    again = run(checkpoint, base, tmp_path / "model")
    assert again.already_complete
    assert again.figures == first.figures and first.figures["records_checked"] > 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()}


def test_changed_inputs_are_refused_with_the_reason_or_replaced(tmp_path, base, checkpoint, trained):
    run(checkpoint, base, tmp_path / "model")
    with pytest.raises(BadInputError, match="dtype was 'bf16', is 'fp32'"):
        run(checkpoint, base, tmp_path / "model", dtype="fp32")
    newer = write_trained(tmp_path / "step9", small_models.train(trained, seed=5), step=9)
    with pytest.raises(BadInputError, match="step was 7, is 9"):
        run(newer, base, tmp_path / "model")
    run(newer, base, tmp_path / "model", replace=True)
    assert_model_is(tmp_path / "model", small_models.train(trained, seed=5))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "step9"]


def test_foreign_folder_is_never_touched(tmp_path, base, checkpoint):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/precious").write_text("x")
    with pytest.raises(BadInputError, match="not made by this program"):
        run(checkpoint, base, tmp_path / "model", replace=True)
    assert (tmp_path / "model/precious").read_text() == "x"


def test_lost_file_of_a_finished_model_is_noticed(tmp_path, base, checkpoint):
    run(checkpoint, base, tmp_path / "model")
    next((tmp_path / "model").glob("*.safetensors")).unlink()
    with pytest.raises(BadInputError, match="now missing or cut"):
        run(checkpoint, base, tmp_path / "model")


def test_two_writers_of_one_folder_are_refused(tmp_path, base, checkpoint):
    folder = ProgressFolder(tmp_path / "model", {"made_by": "another"})
    with folder.locked(shared=False, replace=False), pytest.raises(BadInputError, match="another process"):
        run(checkpoint, base, tmp_path / "model")


def test_too_small_a_disk_is_refused_before_writing(tmp_path, base, checkpoint, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(BadInputError, match="1,000 B free"):
        run(checkpoint, base, tmp_path / "model")


@pytest.mark.parametrize("call", [1, 7, 40])
def test_full_disk_leaves_no_final_name_and_the_same_command_goes_on(tmp_path, base, checkpoint, monkeypatch, call):
    run(checkpoint, base, tmp_path / "whole")
    calls = []
    real = os.pwrite

    def pwrite(descriptor, data, offset):
        calls.append(offset)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(CrashError, match="No space left"):
        run(checkpoint, base, tmp_path / "model")
    monkeypatch.undo()
    assert not (tmp_path / "model").exists()
    finished = {path.name for path in (tmp_path / "model.incomplete").glob("*.safetensors")}
    assert finished == {path.stem for path in (tmp_path / "model.progress").glob("*.safetensors.json")}
    assert run(checkpoint, base, tmp_path / "model").kept == len(finished)
    assert small_models.contents(tmp_path / "model") == small_models.contents(tmp_path / "whole")


KILLER = """
import os, runpy, signal, sys
sys.path[:0] = sys.argv[1:3]
from deepseek_sft.tensors import model_writer, progress_folder, shard_writer
moment, count = sys.argv[3].split(":")
done = []
def kill_at(function):
    def wrapped(*arguments, **options):
        done.append(None)
        if len(done) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return wrapped
target = {
    "write_fully": shard_writer, "publish": shard_writer.OpenShard, "finish": progress_folder.ProgressFolder,
    "_complete": model_writer,
}[moment]
setattr(target, moment, kill_at(getattr(target, moment)))
del sys.argv[1:4]
sys.argv[0] = "convert_checkpoint.py"
runpy.run_path(os.path.join(sys.path[1], "convert_checkpoint.py"), run_name="__main__")
"""


@pytest.mark.parametrize("moment", ["write_fully:2", "write_fully:30", "publish:3", "finish:4", "_complete:1"])
def test_killed_conversion_continues_to_identical_bytes(tmp_path, project, base, checkpoint, moment):
    run(checkpoint, base, tmp_path / "whole")
    workflow = project / "workflow"
    arguments = [f"--checkpoint={checkpoint}", f"--base={base}", f"--output={tmp_path / 'model'}"]
    arguments += [f"--receipt={tmp_path / 'receipt.json'}", "--max-shard-size=20kB", "--workers=2"]
    killer = [sys.executable, "-c", KILLER, str(workflow), str(workflow / "scripts"), moment]
    killed = subprocess.run([*killer, *arguments], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "model").exists() and not (tmp_path / "receipt.json").exists()
    command = [sys.executable, str(workflow / "scripts/convert_checkpoint.py"), *arguments]
    subprocess.run(command, check=True, capture_output=True)
    assert small_models.contents(tmp_path / "model") == small_models.contents(tmp_path / "whole")
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert receipt["result"] == {"model": str(tmp_path / "model")}
    if moment in ("finish:4", "_complete:1"):
        assert receipt["figures"]["files_kept_from_earlier_run"] > 0


def test_dry_run_writes_nothing(tmp_path, project, base, checkpoint):
    script = project / "workflow/scripts/convert_checkpoint.py"
    arguments = [f"--checkpoint={checkpoint}", f"--base={base}", f"--output={tmp_path / 'out'}", "--dry-run"]
    found = subprocess.run(
        [sys.executable, script, *arguments, f"--receipt={tmp_path / 'r.json'}"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["world_size"] == 3
    assert not list(tmp_path.iterdir())


def test_bad_input_ends_with_one_message_and_code_2(tmp_path, project, base):
    script = project / "workflow/scripts/convert_checkpoint.py"
    arguments = [f"--checkpoint={tmp_path}", f"--base={base}", f"--output={tmp_path / 'out'}"]
    found = subprocess.run(
        [sys.executable, script, *arguments, f"--receipt={tmp_path / 'r.json'}"], capture_output=True, text=True
    )
    assert found.returncode == 2
    assert found.stderr.startswith("error: ") and "Traceback" not in found.stderr
