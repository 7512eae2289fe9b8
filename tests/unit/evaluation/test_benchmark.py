"""Measuring speed with vLLM's own program, here a stand-in for it, and without."""

import json
import textwrap

import pytest
from serving_fakes import MODEL, fake_server

from deepseek_sft.evaluation import benchmark
from deepseek_sft.evaluation.api import Api, CheckFailed
from deepseek_sft.evaluation.benchmark import Load

STAND_IN = """
    import json, os, pathlib, sys

    def main():
        options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv if "=" in word)
        with open(os.environ["STAND_IN_CALLS"], "a") as calls:
            calls.write(json.dumps({"process": os.getpid(), "words": sys.argv[1:3], **options}) + "\\n")
        flaw = os.environ.get("STAND_IN_FLAW")
        if flaw == "refuses":
            print("vllm: error: unrecognized arguments: --seed", file=sys.stderr)
            sys.exit(2)
        figures = {"completed": int(options["num-prompts"]) - (flaw == "loses"), "output_throughput": 50.0,
                   "median_ttft_ms": 40.0, "p99_ttft_ms": 90.0, "median_tpot_ms": 20.0}
        pathlib.Path(options["result-dir"], options["result-filename"]).write_text(json.dumps(figures))
"""
LOADS = [Load(1, 4, 4), Load(2, 4, 4)]


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Install the stand-in; the file gets a line for each of its calls."""
    site = tmp_path / "site"
    (site / "vllm-0.32.0.dist-info").mkdir(parents=True)
    (site / "vllm-0.32.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    (site / "vllm-0.32.0.dist-info/entry_points.txt").write_text("[console_scripts]\nvllm = stand_in_vllm:main\n")
    (site / "stand_in_vllm.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("STAND_IN_CALLS", str(tmp_path / "calls.jsonl"))
    return tmp_path / "calls.jsonl"


def measure(url, tmp_path, tokenizer=True):
    api = Api(url, MODEL, 5)
    try:
        return benchmark.measure(api, f"{url}/v1", tmp_path if tokenizer else None, LOADS)
    finally:
        api.close()


def test_one_process_of_vllm_measures_every_load_with_prompts_of_its_own(tmp_path, calls):
    figures = measure("http://127.0.0.1:9", tmp_path)
    assert figures["tool"] == "vllm bench serve 0.32.0"
    assert figures["by_concurrency"]["2"] == {
        "requests": 8,
        "tokens_per_second": 50.0,
        "time_to_first_token_s": 0.04,
        "time_to_first_token_p99_s": 0.09,
        "time_per_output_token_s": 0.02,
    }
    first, second = map(json.loads, calls.read_text().splitlines())
    assert first["words"] == ["bench", "serve"]
    assert first["process"] == second["process"]
    assert first["seed"] != second["seed"]  # the same prompts would come from the server's cache of prefixes
    assert first["base-url"] == "http://127.0.0.1:9"


def test_requests_that_vllm_counts_as_failed_fail_the_check(tmp_path, calls, monkeypatch):
    monkeypatch.setenv("STAND_IN_FLAW", "loses")
    with pytest.raises(CheckFailed, match="1 of 8 requests failed, 1 at a time"):
        measure("http://127.0.0.1:9", tmp_path)


def test_other_versions_options_lead_to_the_built_in_measurement_which_says_why(tmp_path, calls, monkeypatch):
    monkeypatch.setenv("STAND_IN_FLAW", "refuses")
    with fake_server() as server:
        figures = measure(f"http://127.0.0.1:{server.server_port}", tmp_path)
    assert figures["tool"].startswith("built in (vllm bench serve ended with 2")
    assert "unrecognized arguments: --seed" in figures["tool"]
    assert {row["requests"] for row in figures["by_concurrency"].values()} == {8}


def test_without_a_tokenizer_the_built_in_measurement_is_used(tmp_path, calls):
    with fake_server() as server:
        assert measure(f"http://127.0.0.1:{server.server_port}", tmp_path, tokenizer=False)["tool"].startswith(
            "built in (no tokenizer"
        )
    assert not calls.exists()
