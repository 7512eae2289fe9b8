"""tokenize_data: token files, packing, statistics, the script."""

import io
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from unit.data.helpers import PROJECT, TOKENIZER, answer, read_lines, run_script, user, write_lines

from deepseek_sft import files, receipts
from deepseek_sft.data.packing import best_fit
from deepseek_sft.data.samples import Settings
from deepseek_sft.data.show_samples import show
from deepseek_sft.data.tokenization import Outputs, first_samples, tokenize, tokenize_held_out
from deepseek_sft.data.tokens import NO_LOSS, TokenDataset, TokenWriter, write_index
from deepseek_sft.errors import BadInputError
from deepseek_sft.planning.settings import COUNTED, Samples
from deepseek_sft.training.settings import identity

BOS_ID, EOS_ID = 0, 1


@pytest.fixture
def source(tmp_path):
    """39 records whose samples have 14 to 29 tokens."""
    records = [
        {"id": f"r{i}", "messages": [user("Q" + " Q" * (i % 5)), answer("R" + " R" * (i % 11), f"r{i}")]}
        for i in range(1, 40)
    ]
    return write_lines(tmp_path / "train.jsonl", records)


def run(source, name="tokens", max_length=64, **options):
    folder = source.parent
    outputs = Outputs(folder / name, folder / f"{name}.rejects.jsonl", folder / f"{name}.statistics.json")
    truncate = options.pop("truncate", False)
    figures = tokenize(source, TOKENIZER, Settings("deepseek-r1", max_length, truncate=truncate), outputs, **options)
    return figures, TokenDataset(outputs.tokens), outputs


def test_rows_keep_order_ids_and_types(source):
    _, tokens, _ = run(source)
    assert [row["id"] for row in tokens] == [r["id"] for r in read_lines(source)]
    row = tokens[3]
    assert {name: row[name].dtype for name in ("input_ids", "labels", "sample_lengths")} == dict.fromkeys(
        ("input_ids", "labels", "sample_lengths"), np.int32
    )
    assert row["sample_lengths"].tolist() == [len(row["input_ids"])] == [len(row["labels"])]


def test_index_describes_the_rows(source):
    figures, tokens, outputs = run(source)
    info = json.loads((outputs.tokens / "tokens.json").read_text())
    rows = list(tokens)
    assert set(info) == {
        "format", "shards", "rows", "samples", "tokens", "trained_tokens", "max_length", "longest", "vocab_size",
        "template", "packed", "bos_token_id", "eos_token_id", "tokenizer_fingerprint", "sha256",
    }  # fmt: skip
    assert info["rows"] == info["samples"] == len(rows) == figures["samples"]
    assert info["tokens"] == sum(len(r["input_ids"]) for r in rows)
    assert info["trained_tokens"] == sum(int((r["labels"] != NO_LOSS).sum()) for r in rows)
    assert info["longest"] == max(len(r["input_ids"]) for r in rows) == tokens.lengths().max()
    assert info["vocab_size"] > max(int(r["input_ids"].max()) for r in rows)
    assert (info["bos_token_id"], info["eos_token_id"], info["packed"]) == (BOS_ID, EOS_ID, False)
    assert info["tokenizer_fingerprint"] == files.fingerprint(TOKENIZER / "tokenizer.json")


def test_packed_rows_hold_the_same_samples_within_max_length(source):
    _, loose, _ = run(source, "loose")
    figures, packed, _ = run(source, "packed", pack=True)
    samples = []
    for row in packed:
        assert len(row["input_ids"]) == row["sample_lengths"].sum() <= 64
        ends = np.cumsum(row["sample_lengths"])[:-1]
        samples += zip(
            row["id"].split(","), np.split(row["input_ids"], ends), np.split(row["labels"], ends), strict=True
        )
    assert len(packed) < len(loose) == figures["samples"] == len(samples) and packed.info["packed"]
    assert packed.info["tokens"] == loose.info["tokens"]
    expected = {row["id"]: (row["input_ids"].tolist(), row["labels"].tolist()) for row in loose}
    assert {name: (ids.tolist(), labels.tolist()) for name, ids, labels in samples} == expected
    assert not list(packed.path.glob("loose"))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 90))
def test_packing_loses_nothing_and_overfills_nothing(lengths, capacity):
    rows = best_fit(np.array(lengths, np.int32), capacity)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    loads = [sum(lengths[n] for n in row) for row in rows]
    assert max(loads) <= capacity
    assert sum(load * 2 <= capacity for load in loads) <= 1  # two half-empty rows would have been one
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 6)), min_size=1, max_size=20), st.integers(50, 400))
def test_copies_of_a_sample_never_share_a_packed_row(samples, capacity):
    lengths = [length for length, copies in samples for _ in range(copies)]
    originals = [number if copies > 1 else -1 for number, (_, copies) in enumerate(samples) for _ in range(copies)]
    rows = best_fit(np.array(lengths, np.int32), capacity, originals)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    assert max(sum(lengths[n] for n in row) for row in rows) <= capacity
    for row in rows:
        copies = [originals[n] for n in row if originals[n] >= 0]
        assert len(copies) == len(set(copies))


def test_copies_of_a_weighted_record_are_packed_apart(tmp_path):
    lines = [{"id": f"r{i}", "weight": 3, "messages": [user(f"Q{i}"), answer("R", "A")]} for i in range(6)]
    lines += [{"id": f"s{i}", "messages": [user(f"P{i}"), answer("R", "A")]} for i in range(6)]
    figures, packed, _ = run(write_lines(tmp_path / "train.jsonl", lines), "copies", 512, pack=True)
    rows = [[name.partition("~")[0] for name in row["id"].split(",")] for row in packed]
    assert figures["samples"] == sum(map(len, rows)) == 24 and len(rows) == 3
    assert all(len(row) == len(set(row)) for row in rows)


@pytest.mark.parametrize("pack", [False, True])
def test_tokens_do_not_depend_on_workers(tmp_path, pack):
    lines = [{"id": f"r{i}", "messages": [user(f"Q{i}"), answer("R", "A" * (i % 9 + 1))]} for i in range(600)]
    source = write_lines(tmp_path / "train.jsonl", [*lines, "{broken", {"id": "y", "messages": []}])
    one, _, first = run(source, "one", 24, pack=pack)
    two, _, second = run(source, "two", 24, pack=pack, workers=2)
    assert one == two
    for a, b in ((first.tokens, second.tokens), (first.rejects, second.rejects), (first.statistics, second.statistics)):
        assert files.fingerprint(a) == files.fingerprint(b)
    assert [r["id"] for r in read_lines(first.rejects)] == ["train.jsonl:601", "y"]


def test_too_long_samples_are_rejected_counted_and_exemplified(source):
    figures, tokens, outputs = run(source, max_length=17)
    statistics = json.loads(outputs.statistics.read_text())
    assert 0 < figures["rejected"] == len(read_lines(outputs.rejects)) == len(read_lines(source)) - len(tokens)
    assert statistics["rejects"] == {"too_long": figures["rejected"]}
    assert 1 <= len(statistics["reject_examples"]["too_long"]) <= 3
    assert statistics["length"]["max"] <= 17


def test_truncation_is_counted(source):
    figures, tokens, _ = run(source, max_length=17, truncate=True)
    assert figures["truncated"] == sum(EOS_ID not in row["input_ids"] for row in tokens) > 0
    assert figures["longest"] == 17


def test_statistics_add_up(source):
    figures, _, outputs = run(source)
    statistics = json.loads(outputs.statistics.read_text())
    assert sum(b["samples"] for b in statistics["length_histogram"]) == figures["samples"] == statistics["samples"]
    assert statistics["trained_share"] == round(figures["trained_tokens"] / figures["tokens"], 4)
    assert statistics["answer_length"]["count"] == statistics["turns"]


def test_control_tokens_spelled_in_text_are_counted(tmp_path):
    lines = [
        {"id": "a", "messages": [user("say <think>"), answer("R", "A")]},
        {"id": "b", "messages": [user(), answer("R", "A")]},
    ]
    figures, _, _ = run(write_lines(tmp_path / "train.jsonl", lines))
    assert figures["records_spelling_control_tokens"] == 1


def test_no_sample_is_an_error_that_leaves_the_reasons(source):
    with pytest.raises(BadInputError, match=r"no sample \(too_long .*\n.*raise --max-length"):
        run(source, max_length=5)
    assert not (source.parent / "tokens").exists()
    assert read_lines(source.parent / "tokens.rejects.jsonl")


def test_second_run_replaces_the_first(source):
    run(source, max_length=17)
    _, tokens, _ = run(source, max_length=64)
    assert tokens.info["max_length"] == 64
    assert [p.name for p in source.parent.iterdir() if p.name.startswith(".")] == []


def test_failed_run_leaves_the_previous_tokens(source):
    _, tokens, _ = run(source)
    with pytest.raises(BadInputError):
        run(source, max_length=5)
    assert len(TokenDataset(tokens.path)) == len(tokens)


def test_missing_input_is_named(tmp_path):
    with pytest.raises(BadInputError, match=r"absent\.jsonl"):
        run(tmp_path / "absent.jsonl")


def write_shards(folder, count, **options):
    writer = TokenWriter(folder, **options)
    for i in range(count):
        ids = np.arange(i % 5 + 1, dtype=np.int32) + i
        writer.add(str(i), ids, ids, np.array([len(ids)], np.int32))
    shards = writer.close()
    write_index(folder, {"rows": count, "shards": shards})
    return shards


def test_rows_are_found_across_batches_and_shards(tmp_path):
    assert len(write_shards(tmp_path, 200, shard_tokens=100, batch_tokens=20)) > 3
    tokens = TokenDataset(tmp_path)
    assert [row["id"] for row in tokens] == [str(i) for i in range(200)]
    assert tokens[137]["input_ids"].tolist() == [137, 138, 139]
    assert tokens[-1]["id"] == "199"
    assert tokens.lengths().tolist() == [i % 5 + 1 for i in range(200)]
    with pytest.raises(IndexError):
        tokens[200]


def test_reader_can_be_pickled_to_other_processes(tmp_path):
    write_shards(tmp_path, 5)
    copy = pickle.loads(pickle.dumps(TokenDataset(tmp_path)))
    assert copy[4]["id"] == "4"


def test_reader_maps_and_copies_nothing(tmp_path):
    write_shards(tmp_path, 5)
    ids = TokenDataset(tmp_path)[2]["input_ids"]
    assert not ids.flags.owndata and not ids.flags.writeable


@pytest.mark.parametrize("damage", ["cut", "remove shard", "remove index", "rows", "format", "json"])
def test_damaged_token_folder_is_refused(tmp_path, damage):
    (shard,) = write_shards(tmp_path, 50)
    index = tmp_path / "tokens.json"
    if damage == "cut":
        (tmp_path / shard).write_bytes((tmp_path / shard).read_bytes()[:-40])
    elif damage == "remove shard":
        (tmp_path / shard).unlink()
    elif damage == "remove index":
        index.unlink()
    elif damage == "json":
        index.write_text("{")
    else:
        info = json.loads(index.read_text())
        index.write_text(json.dumps(info | {damage: 49}))
    with pytest.raises(BadInputError, match="tokenize_data"):
        TokenDataset(tmp_path)


def test_show_makes_control_tokens_and_training_visible(source):
    samples = first_samples(source, TOKENIZER, Settings("deepseek-r1", 64), 2)
    stream = io.StringIO()
    show(samples, TOKENIZER, "deepseek-r1", Console(file=stream, force_terminal=True, width=100))
    shown = stream.getvalue()
    assert "<｜User｜>" in shown and "<think>" in shown and "r1" in shown
    assert "\x1b[1;32m" in shown or "1;32" in shown


def arguments(source, **changes):
    folder = source.parent
    chosen = {
        "--input": source, "--tokenizer": TOKENIZER, "--template": "deepseek-r1", "--max-length": 64,
        "--output": folder / "tokens", "--rejects": folder / "r.jsonl", "--statistics": folder / "s.json",
        "--receipt": folder / "receipts" / "tokenize_data.json", **changes,
    }  # fmt: skip
    return [part for pair in chosen.items() for part in pair]


def test_script_writes_receipt_and_result(source):
    done = run_script("tokenize_data.py", *arguments(source))
    assert done.returncode == 0, done.stderr
    receipt = json.loads((source.parent / "receipts" / "tokenize_data.json").read_text())
    assert receipt["rule"] == "tokenize_data"
    assert set(receipt["result"]) == {"tokens", "rejects", "statistics"}
    assert receipt["inputs"]["data"]["fingerprint"] == files.fingerprint(source)
    assert receipt["figures"]["samples"] == len(TokenDataset(source.parent / "tokens"))


@pytest.mark.parametrize("packed", [False, True])
def test_the_plan_reads_rows_samples_and_lengths_from_the_receipt_that_the_script_writes(source, packed):
    done = run_script("tokenize_data.py", *arguments(source), *(["--pack"] if packed else []))
    assert done.returncode == 0, done.stderr
    receipt = receipts.read(source.parent / "receipts/tokenize_data.json", "tokenize_data", COUNTED)
    found, rows = Samples.counted(receipt), TokenDataset(source.parent / "tokens").rows()
    assert (found.rows, found.packed, found.longest_row) == (len(rows), packed, rows.lengths.max())
    assert found.per_row * found.rows == receipt["figures"]["samples"]
    assert set(found.spread.lengths.tolist()) == set(rows.lengths.tolist())
    assert set(found.spread.pairs.tolist()) == set(rows.pairs.tolist())


def test_script_show_writes_nothing(source):
    done = run_script("tokenize_data.py", "--input", source, "--tokenizer", TOKENIZER, "--show", 2)
    assert done.returncode == 0, done.stderr
    assert "<｜Assistant｜>" in done.stdout
    assert [p.name for p in source.parent.iterdir()] == [source.name]


def test_script_exits_2_on_a_missing_tokenizer_without_traceback(source, tmp_path):
    done = run_script("tokenize_data.py", *arguments(source, **{"--tokenizer": tmp_path / "nowhere"}))
    assert done.returncode == 2
    assert "error: no tokenizer in" in done.stderr and "Traceback" not in done.stderr


def test_demo_samples_are_short(tmp_path):
    run_script(
        "prepare_data.py", "--source", PROJECT / "resources" / "demo" / "chats.jsonl",
        "--output", tmp_path / "train.jsonl", "--rejects", tmp_path / "r", "--receipt", tmp_path / "p.json",
    )  # fmt: skip
    figures, _, _ = run(tmp_path / "train.jsonl", max_length=128)
    assert figures["rejected"] == 0 and figures["mean_length"] < 60 and figures["longest"] <= 96


def test_held_out_tokens_leave_the_training_tokens_and_their_identity_as_they_are(source, tmp_path):
    """So that a begun run goes on when validation is set."""
    held = [{"id": f"h{i}", "messages": [user("Q"), answer("R", f"h{i}")], "weight": 3} for i in range(4)]
    write_lines(tmp_path / "held_out.jsonl", held)
    made = {}
    for name, more in (("without", []), ("with", ["--held-out", tmp_path / "held_out.jsonl", "--pack"])):
        folder = tmp_path / name
        words = ["--input", source, "--tokenizer", TOKENIZER, "--max-length", 64, "--pack", *more]
        words += ["--output", folder / "tokens", "--rejects", folder / "rejects", "--statistics", folder / "statistics"]
        folder.mkdir()
        done = run_script("tokenize_data.py", *map(str, words), "--receipt", str(folder / "receipt.json"))
        assert done.returncode == 0, done.stderr
        made[name] = receipts.read(folder / "receipt.json", "tokenize_data")
    assert identity(made["with"]) == identity(made["without"])
    sums = [json.loads((tmp_path / name / "tokens/tokens.json").read_text())["sha256"] for name in made]
    assert sums[0] == sums[1]
    rows = TokenDataset(made["with"]["result"]["held_out_tokens"])
    ids = sorted(name for row in rows for name in row["id"].split(","))
    assert ids == ["h0", "h1", "h2", "h3"], "each once, whatever its weight"
    assert made["with"]["figures"]["held_out"]["samples"] == 4
    assert "held_out_tokens" not in made["without"]["result"]


def test_held_out_samples_without_a_trained_token_are_refused(source):
    record = {"id": "h", "messages": [user("Q"), answer("R", "h") | {"loss": False}, user("Q")]}
    held = write_lines(source.parent / "held_out.jsonl", [record])
    with pytest.raises(BadInputError, match=r"held_out\.jsonl"):
        tokenize_held_out(held, TOKENIZER, Settings("deepseek-r1", 64), source.parent / "held")
