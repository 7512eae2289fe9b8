"""Files of ours that are torn, edited or hostile end in one sentence that names the file, through one reader."""

import json
import re
import struct
from pathlib import Path

import pytest
from training_helpers import write_checkpoint

from deepseek_sft import chain, json_files, receipts, time_limits
from deepseek_sft.cluster_jobs.record import Record
from deepseek_sft.convert import base_sums, marker
from deepseek_sft.data import tokens
from deepseek_sft.errors import BadInputError
from deepseek_sft.planning.settings import COUNTED, Samples
from deepseek_sft.preflight import settings as preflight_settings
from deepseek_sft.report import collect
from deepseek_sft.serving import deployment_job, lasting_endpoint
from deepseek_sft.tensors import safetensors_files
from deepseek_sft.training import checkpoints, run_folder

WORKFLOW = Path(__file__).resolve().parents[2] / "workflow"
# Readers of what users and servers write, with rules of their own.
OTHER_READERS = {
    *("data/prepare.py", "data/formats.py", "data/tools.py", "data/hints.py", "data/base_template.py"),
    *(
        "data/template_check.py",
        "data/tokenization.py",
        "data/encoding.py",
        "evaluation/held_out.py",
        "evaluation/api.py",
    ),
    # Lines between a process and its child, and records that are rendered: no files.
    *("data/template_child.py", "data/template_process.py", "data/base_rendering.py"),
    *("report/chat_section.py", "strict_yaml.py", "json_files.py"),
    *("data/evaluation_sets.py", "data/held_out_split.py", "evaluation/server_checks.py"),
    "task_evaluation/lm_eval_run.py",  # what lm-eval hands to a model, and lines of its own run
    "macros.sbatch.j2",  # slow_nodes.json in the job itself; torn, no node is left out
}
NOT_JSON = {
    "empty": b"",
    "torn": b'{"schema": 1, "rule": "tra',
    "two": b"{}{}",
    "zeros": bytes(4096),
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "NaN": b'{"a": NaN}',
    "infinite": b'{"a": -Infinity}',
    "too large for a float": b'{"a": 1e999}',
    "too many digits": b'{"a": ' + b"9" * 5000 + b"}",
    "many digits": b'{"a": ' + b"9" * 400 + b"}",
    "a key twice": b'{"rule": "train", "rule": "plan"}',
    "deep lists": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a": ' * 5000 + b"1" + b"}" * 5000,
    "nested": b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}",
    "a list": b"[]",
    "a text": b'"x"',
    "null": b"null",
    "a number": b"7",
}
WRONG = [None, True, 7, -1, 1.5, "x", "", [], [1], {}, {"x": {}}]


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_no_object_is_refused_with_the_file_and_what_to_do(content, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(BadInputError) as error:
        json_files.read(path, fix="do this")
    assert str(path) in error.value.problem and error.value.fix == "do this"
    assert "\n" not in error.value.problem and len(error.value.problem) < 300


def test_a_missing_key_and_a_wrong_type_are_named(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{"a": {"b": "7"}, "ok": true}')
    with pytest.raises(BadInputError, match=r'b is a text \("7"\), not a whole number'):
        json_files.read(path, {"a": {"b": int}})
    with pytest.raises(BadInputError, match=r"c is missing"):
        json_files.read(path, {"c": str})
    with pytest.raises(BadInputError, match=r"ok is true/false \(true\), not a number"):
        json_files.read(path, {"ok": float})


def test_there_is_one_reader():
    places = {
        path.relative_to(WORKFLOW / "deepseek_sft").as_posix()
        if path.is_relative_to(WORKFLOW / "deepseek_sft")
        else path.name
        for path in WORKFLOW.rglob("*")
        if path.suffix in (".py", ".smk", ".j2", ".sh") and re.search(r"\bjson\.loads?\(", path.read_text())
    }
    assert places <= OTHER_READERS


# ---- the files themselves: reader → what is allowed to come out


def read_receipt(path):
    return receipts.read(path, "train")


def read_gate(path):
    from training_helpers import settings

    return run_folder.check_gate(path.parent, settings())


def judge_marker(path):
    return checkpoints.judge(path.parent, "abc")


READERS = {
    "receipts/train.json": read_receipt,
    "gate.json": read_gate,
    "status.json": lambda path: run_folder.read_status(path.parent, "1", patience=0),
    "step_4/committed.json": judge_marker,
    "step_8/committed.json": lambda path: marker.read_marker(path.parent),
    "tokens.json": lambda path: tokens.check_shards(path.parent),
    "base_sums.json": base_sums.read,
    "endpoint.json": lasting_endpoint.Endpoint.read,
    "serve/job.json": deployment_job._read,
    "nodes/0.json": lambda path: lasting_endpoint.who_serves(path.parent),
    "record.json": Record.read,
    "chain/receipts/train.json": lambda path: chain.judge(path.parents[1]),
    "report/receipts/train.json": lambda path: (
        collect.collect(path.parents[1], None) if hasattr(collect, "collect") else collect.read_json(path)
    ),
}
SOUND = {
    "receipts/train.json": {"schema": 1, "rule": "train", "inputs": {}, "settings": {}, "result": {}, "figures": {}},
    "gate.json": {"kind": "first_loss", "message": "m", "value": 3.0},
    "status.json": {"attempt": "1", "outcome": "finished", "message": "", "fix": "", "figures": {}},
    "tokens.json": {"format": 1, "shards": [], "rows": 0, "vocab_size": 9, "sha256": {}},
    "base_sums.json": {"format": 1, "files": {"a": {"bytes": 1, "sha256": "x"}}},
    "endpoint.json": {"url": "u", "model": "m", "nodes": [], "api_key_file": "k", "stop": "s"},
    "serve/job.json": {"job": "7", "run_dir": "r", "log": "l", "model": "m"},
    "nodes/0.json": {"node": "n", "address": "a", "interface": "i", "rank": 0, "processes": []},
}


def damages(name: str) -> list[bytes]:
    """Texts that are no JSON objects, and the sound content with every value replaced by one of another type."""
    sound = SOUND.get(name) or SOUND["receipts/train.json"]
    edited = [json.dumps(sound | {key: value}).encode() for key in sound for value in WRONG]
    cut = [json.dumps({k: v for k, v in sound.items() if k != key}).encode() for key in sound]
    return [*NOT_JSON.values(), *edited, *cut]


@pytest.mark.parametrize("name", READERS)
def test_no_damage_of_a_file_raises_anything_but_the_error_for_bad_input(name, tmp_path):
    path = tmp_path / name
    if name.startswith("step_"):
        write_checkpoint(tmp_path, int(name[5]))
        SOUND[name] = json.loads(path.read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    for content in damages(name):
        path.write_bytes(content)
        try:
            READERS[name](path)
        except BadInputError as error:
            assert str(tmp_path) in error.problem
        except Exception as error:
            if getattr(error, "exit_code", None) != 3:  # a gate that stands
                raise AssertionError(f"{content[:200]!r}: {error!r}") from error


# What later stages rely on in receipts: figures and their sound values, reader.
COUNTS = {"rows": 9, "mean_length": 4.5, "longest": 7}
PLANNED = {
    **dict.fromkeys(("host_memory_bytes", "disk_bytes", "checkpoint_bytes", "rank_memory_bytes"), 1 << 30),
    "checkpoint_s": 3.5,
    "loading_s": None,
    "step_slowest_s": 2,
}
RELYING = {
    "rows that the plan counts": (
        "tokenize_data",
        COUNTS,
        lambda path: Samples.counted(receipts.read(path, "tokenize_data", COUNTED)),
    ),
    "memory that preflight looks for": ("plan", PLANNED, preflight_settings.needs_of),
    "seconds that limits follow from": (
        "plan",
        PLANNED,
        lambda path: time_limits.Planned.of_figures(
            receipts.read(path, "plan", time_limits.Planned.FIGURES)["figures"]
        ),
    ),
}


@pytest.mark.parametrize("what", RELYING)
def test_edited_figures_of_a_receipt_are_refused_by_whoever_relies_on_them(what, tmp_path):
    rule, figures, reader = RELYING[what]
    path = tmp_path / f"{rule}.json"
    receipt = SOUND["receipts/train.json"] | {"rule": rule}

    def read(changed):
        path.write_text(json.dumps(receipt | {"figures": changed}))
        return reader(path)

    assert read(figures)
    refused = 0
    for name in figures:
        for value in ("a text", [], {}, True):
            try:
                read(figures | {name: value})
            except BadInputError as error:
                assert name in error.problem
                refused += 1
    assert refused >= 3 * 4  # each reader needs three figures or more


def test_a_bad_marker_falls_back_to_the_older_checkpoint(tmp_path):
    for step in (4, 8):
        write_checkpoint(tmp_path, step)
    newest = tmp_path / "step_8/committed.json"
    for content in NOT_JSON.values():
        newest.write_bytes(content)
        assert checkpoints.newest(tmp_path, "abc").step == 4


# ---- headers of safetensors files


def header(text: bytes, length: int | None = None, data: bytes = bytes(64)) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} | changes}).encode()


HEADERS = {
    **{f"no JSON: {name}": header(content) for name, content in NOT_JSON.items()},
    "length 0": header(b"", 0),
    "length beyond the file": header(entry(), 1 << 20),
    "length 2^63": header(entry(), 1 << 63),
    "dtype unknown": header(entry(dtype="F99")),
    "dtype a list": header(entry(dtype=[])),
    "shape negative": header(entry(shape=[-16])),
    "two negative shapes": header(entry(shape=[-4, -4])),
    "shape huge": header(entry(shape=[1 << 62, 1 << 62])),
    "shape a text": header(entry(shape="16")),
    "shape true": header(entry(shape=[True, 16])),
    "shape of floats": header(entry(shape=[16.0])),
    "shape null": header(entry(shape=None)),
    "offsets reversed": header(entry(data_offsets=[64, 0])),
    "offsets beyond": header(entry(data_offsets=[0, 1 << 40])),
    "offsets negative": header(entry(data_offsets=[-64, 0])),
    "offsets of three": header(entry(data_offsets=[0, 32, 64])),
    "offsets texts": header(entry(data_offsets=["0", "64"])),
    "offsets with a hole": header(entry(data_offsets=[32, 96]), data=bytes(96)),
    "bytes left over": header(entry(), data=bytes(65)),
    "bytes missing": header(entry(), data=bytes(63)),
    "entry a list": header(b'{"a": []}'),
    "entry null": header(b'{"a": null}'),
    "entries of mixed types": header(b'{"a": {"data_offsets": [0, 64]}, "b": {"data_offsets": "x"}}'),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_hostile_header_is_refused_with_its_file(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=r"model\.safetensors"):
        safetensors_files.read_header(path)
