"""The served model against the losses that training left: what is chosen, passed on, asked and judged."""

import json
from pathlib import Path

import numpy as np
import pytest
from serving_fakes import LOGPROB, MODEL, fake_server

from deepseek_sft import engines, receipts
from deepseek_sft.convert import marker
from deepseek_sft.data import loss_rows, tokens
from deepseek_sft.errors import BadInputError, GateError
from deepseek_sft.evaluation import as_trained, smoke_test
from deepseek_sft.evaluation.transformers_comparison import ModelFolder
from deepseek_sft.settings.smoke_settings import SmokeSettings

RECORD = {
    "format": 1,
    "dtype": "bfloat16",
    "step": 8,
    "rows": [
        {"id": "a", "tokens": [0, 5, 6, 7], "losses": [-LOGPROB] * 3, "of": 4},
        {"id": "long", "tokens": list(range(100)), "losses": [-LOGPROB] * 99, "of": 9000},
    ],
}


def dataset(folder: Path, rows: list[tuple[str, list[int]]]) -> tokens.TokenDataset:
    """Rows by name, with the lengths of the samples in each; token ids count up."""
    folder.mkdir()
    writer = tokens.TokenWriter(folder)
    for name, lengths in rows:
        ids = np.arange(sum(lengths), dtype=np.int32)
        writer.add(name, ids, ids, np.array(lengths, np.int32))
    tokens.write_index(folder, {"shards": writer.close(), "rows": len(rows)})
    return tokens.TokenDataset(folder)


def texts(found: tokens.TokenDataset, samples: list[loss_rows.Sample]) -> list[tuple[str, int, int]]:
    return [(found[s.row]["id"], s.start, s.length) for s in samples]


def test_rows_are_chosen_by_their_hash_whatever_their_order(tmp_path):
    rows = [(f"row-{i}", [10 + i]) for i in range(50)]
    one, two = dataset(tmp_path / "one", rows), dataset(tmp_path / "two", rows[::-1])
    chosen = texts(one, loss_rows.choose(one))
    assert len(chosen) == loss_rows.ROWS
    assert chosen == texts(two, loss_rows.choose(two))
    assert chosen != texts(one, [loss_rows.Sample(i, 0, 10 + i) for i in range(8)])


def test_one_of_the_rows_is_long_where_there_is_one(tmp_path):
    rows = [(f"row-{i}", [10]) for i in range(50)] + [("long", [loss_rows.LONG + 1]), ("almost", [loss_rows.LONG])]
    found = dataset(tmp_path / "tokens", rows)
    assert [name for name, _, length in texts(found, loss_rows.choose(found)) if length > 10][-1:] == ["long"]


def test_samples_of_packed_rows_are_taken_one_by_one(tmp_path):
    found = dataset(tmp_path / "tokens", [("packed", [1, 3, 5])])
    samples = loss_rows.choose(found)
    assert sorted((s.start, s.length) for s in samples) == [(1, 3), (4, 5)]  # one token predicts nothing
    record = loss_rows.record(found, samples, [[0.123456789] * (s.length - 1) for s in samples], "float32", 3)
    assert {tuple(row["tokens"]) for row in record["rows"]} == {(1, 2, 3), (4, 5, 6, 7, 8)}
    assert record["rows"][0]["losses"][0] == 0.12346


def test_marker_passes_the_losses_on_and_one_without_them_stays_valid(tmp_path):
    content = {
        "format": 1,
        "run_id": "a",
        "step": 8,
        "world_size": 1,
        "zero_stage": 3,
        "parameter_prefix": "llm.",
        "experts": {"layout": "w1w3_w2", "experts_per_shard": 1},
        "files": {},
    }
    for value, expected in ((content, None), (content | {loss_rows.KEY: RECORD}, RECORD)):
        (tmp_path / engines.MARKER).write_text(json.dumps(value))
        assert marker.read_marker(tmp_path).trained_losses == expected


def verified(folder: Path, **figures: object) -> Path:
    path = folder / "verify_model.json"
    receipts.write(path, "verify_model", inputs={}, settings={}, result={}, figures=figures)
    return path


def test_receipt_without_losses_is_no_error(tmp_path):
    assert as_trained.read(verified(tmp_path)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"rows": []},
        {"rows": None},
        {"rows": [{"id": "a", "tokens": [1, 2, 3], "losses": [0.5]}]},
        {"rows": [{"id": "a", "tokens": [1, "x"], "losses": [0.5]}]},
        {"rows": [{"id": "a", "tokens": [1, 2], "losses": [None]}]},
    ],
)
def test_malformed_losses_are_named_as_such(tmp_path, change):
    path = verified(tmp_path, **{loss_rows.KEY: RECORD | change})
    with pytest.raises(BadInputError, match="trained_losses is malformed"):
        as_trained.read(path)


def run(server, tmp_path: Path, trained: as_trained.Trained | None) -> smoke_test.Report:
    return smoke_test.run(
        smoke_test.Server(
            f"http://127.0.0.1:{server.server_port}", MODEL, reasoning_parser="deepseek_r1", trained=trained
        ),
        SmokeSettings(max_tokens=16, concurrency=2, request_timeout_s=60, benchmark=False),
        tmp_path / "transcript.jsonl",
        tmp_path / "evaluation.jsonl",
    )


def test_server_that_computes_what_was_trained_passes_and_long_rows_are_cut_to_its_context(tmp_path):
    with fake_server() as server:
        report = run(server, tmp_path, as_trained.parse(RECORD))
    assert report.checks["weights_as_trained"]["passed"]
    assert report.figures["weights_as_trained"]["tokens"] == 3 + server.context - 2
    assert report.figures["weights_as_trained"]["mean_absolute_difference"] == 0


def moved(by: float, alternating: bool) -> as_trained.Trained:
    """Losses that the served ones differ from: all in one direction, or in both, so that their mean stays."""
    rows = [
        row | {"losses": [v + (by if not alternating or i % 2 else -by) for i, v in enumerate(row["losses"])]}
        for row in RECORD["rows"]
    ]
    return as_trained.parse(RECORD | {"rows": rows})


@pytest.mark.parametrize(
    ("times", "alternating", "words"),
    [(1.2, False, "the mean loss differs"), (1.2, True, "single tokens differ"), (float("inf"), True, "of the tokens")],
)
def test_server_that_computes_something_else_fails_that_check_alone(tmp_path, times, alternating, words):
    bound = as_trained.BOUNDS["bfloat16"]
    by = min(times, 100) * (bound.absolute if alternating else bound.mean)
    with fake_server() as server, pytest.raises(GateError) as raised:
        run(server, tmp_path, moved(by, alternating))
    (line,) = raised.value.problem.splitlines()[1:]
    assert line.strip().startswith("weights_as_trained")
    assert words in line


def test_run_that_left_no_losses_is_not_measured_and_not_passed(tmp_path):
    with fake_server() as server:
        report = run(server, tmp_path, None)
    assert report.skipped["weights_as_trained"].startswith("not measured")
    assert "weights_as_trained" not in report.checks


@pytest.mark.parametrize(
    ("trained", "config", "served", "judged"),
    [
        ("bfloat16", {"torch_dtype": "bfloat16"}, "auto", "bfloat16"),
        ("float32", {"torch_dtype": "float32"}, "float32", "float32"),
        ("float32", {"dtype": "float32"}, "auto", "bfloat16"),  # vLLM's auto serves FP32 models in 16 bits
        ("float32", {"torch_dtype": "bfloat16"}, "auto", "bfloat16"),
        ("bfloat16", {"torch_dtype": "float32"}, "float32", "bfloat16"),
        ("bfloat16", {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}, "auto", "fp8"),
        ("bfloat16", {"torch_dtype": "bfloat16"}, "float16", "bfloat16"),
    ],
)
def test_bounds_are_those_of_the_coarser_dtype(tmp_path, trained, config, served, judged):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert as_trained.judged_as(trained, ModelFolder(tmp_path), served) == judged
