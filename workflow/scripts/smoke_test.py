"""Test a served model through its API, as a client would.

Checks: health; the model's name and context; a model it does not have is refused; a chat answer that is not empty;
reasoning and answer in fields of their own; the model ends by itself, with its end-of-sentence token; the same greedy
answer twice and streamed; many requests at once; a full context answered, one token more refused; held-out samples in
the right form and, where a bound is set, right; no template token in any answer; prompts as training rendered them;
log-probabilities equal to transformers' (small models), and to those that training left with its final weights; the
loss on held-out references, and its drop from the base model's; speed; health at the end. Temperature is 0 throughout.

The receipt is written only if all checks pass; otherwise the exit code is 3 and the failed checks are listed. The
transcript and the record of the held-out samples are kept in both cases. An API key is read from VLLM_API_KEY.
"""

import dataclasses
import os
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, files, receipts
from deepseek_sft.errors import BadInputError
from deepseek_sft.evaluation import as_trained, smoke_test
from deepseek_sft.serving import lasting_endpoint
from deepseek_sft.settings import options
from deepseek_sft.settings.smoke_settings import SmokeSettings, record_beside


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--url", required=True, help="base URL of the server, http://host:port")
    parser.add_argument("--model", required=True, help="name it serves the model under")
    parser.add_argument("--receipt", type=Path, required=True, help="receipt to write, receipts/smoke_test.json")
    parser.add_argument("--transcript", type=Path, required=True, help="JSONL of all requests and answers")
    parser.add_argument(
        "--evaluation", type=Path, help="JSONL of the held-out samples [evaluation.jsonl beside the transcript]"
    )
    parser.add_argument(
        "--model-dir", type=Path, help="folder of the served model, for the comparison with transformers and training"
    )
    parser.add_argument("--base-dir", type=Path, help="folder of its base model [the one that --model-receipt names]")
    parser.add_argument("--model-receipt", type=Path, help="receipt of verify_model, recorded as this test's input")
    parser.add_argument("--max-model-len", type=int, help="context the server was started with")
    parser.add_argument("--reasoning-parser", default="deepseek_r1", help="the server's parser, or none")
    parser.add_argument("--tool-call-parser", help="the server's parser of tool calls [none]")
    parser.add_argument("--dtype", default="auto", help="dtype the server computes in")
    parser.add_argument("--time-to-ready", type=float, help="seconds the server took to start, for the receipt")
    parser.add_argument(
        "--run-dir", type=Path, help="folder of the deployment: its nodes and processes, for the receipt"
    )
    parser.add_argument("--hosts", help="nodes that serve, separated by commas, for the receipt")
    options.add(parser, SmokeSettings)
    arguments = parser.parse_args()

    files.require_writable(arguments.receipt, arguments.transcript, arguments.evaluation)
    if arguments.model_dir and not (arguments.model_dir / "config.json").is_file():
        raise BadInputError(f"--model-dir {arguments.model_dir}: no config.json in it")
    settings = options.chosen(SmokeSettings, arguments)
    record = arguments.evaluation or record_beside(arguments.transcript)
    parser_name = None if arguments.reasoning_parser in ("", "none") else arguments.reasoning_parser
    server = smoke_test.Server(
        arguments.url,
        arguments.model,
        reasoning_parser=parser_name,
        tool_call_parser=arguments.tool_call_parser,
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
        model_dir=arguments.model_dir,
        base_dir=arguments.base_dir or base_of(arguments.model_receipt),
        api_key=os.environ.get("VLLM_API_KEY", ""),
        trained=as_trained.read(arguments.model_receipt) if arguments.model_receipt else None,
    )
    cli.say(f"smoke test of {arguments.model} at {arguments.url}")
    try:
        report = smoke_test.run(server, settings, arguments.transcript, record)
    except smoke_test.ChecksFailed as failed:
        left = {"checks": failed.report.checks, "skipped": failed.report.skipped} | failed.report.figures
        receipts.write_failed(arguments.receipt, "smoke_test", left)
        raise
    inputs = {}
    if arguments.model_receipt:
        inputs["verify_model"] = receipts.input_entry(arguments.model_receipt)
    for name in ("prompts", "base_measured"):
        if getattr(settings, name):
            inputs[name] = receipts.input_entry(getattr(settings, name))
    receipts.write(
        arguments.receipt,
        "smoke_test",
        inputs=inputs,
        settings={"model": arguments.model, "reasoning_parser": parser_name, "temperature": 0}
        | dataclasses.asdict(settings),
        result={"transcript": str(arguments.transcript)} | ({"evaluation": str(record)} if record.exists() else {}),
        figures={"checks": report.checks, "skipped": report.skipped, "time_to_ready_s": arguments.time_to_ready}
        | ({"nodes": lasting_endpoint.who_serves(arguments.run_dir)} if arguments.run_dir else {})
        | report.figures,
        hosts=arguments.hosts.split(",") if arguments.hosts else None,
    )
    lacking = [name for name, why in report.skipped.items() if why.startswith(as_trained.NOT_MEASURED)]
    but = f"; not measured: {', '.join(lacking)}" if lacking else ""
    cli.say(f"all {len(report.checks)} checks that were made passed{but}; receipt {arguments.receipt}")


def base_of(model_receipt: Path | None) -> Path | None:
    """Folder of the base model that the verified model was compared with; None where it has gone."""
    if not model_receipt:
        return None
    base = receipts.read(model_receipt, "verify_model")["inputs"].get("base", {}).get("path")
    return Path(base) if base and Path(base, "config.json").is_file() else None


if __name__ == "__main__":
    cli.run(main)
