"""Test a served model through its API, as a client would.

Checks: health; the model's name; a model it does not have is refused; a chat answer that is not empty; reasoning and
answer in fields of their own; no template token in the text; the model ends by itself; the same greedy answer twice and
streamed; many requests at once; an over-long prompt is refused; log-probabilities equal to transformers' (small
models); held-out prompts in the right form; health at the end. Temperature is 0 throughout.

The receipt is written only if all checks pass; otherwise the exit code is 3 and the failed checks are listed. The
transcript is kept in both cases. An API key is read from the variable VLLM_API_KEY.
"""

import os
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, receipts
from deepseek_sft.errors import BadInputError
from deepseek_sft.serving import lasting, smoke
from deepseek_sft.serving.settings import SmokeSettings


def main() -> None:
    default = SmokeSettings()
    parser = cli.parser(__doc__)
    parser.add_argument("--url", required=True, help="base URL of the server, http://host:port")
    parser.add_argument("--model", required=True, help="name it serves the model under")
    parser.add_argument("--receipt", type=Path, required=True, help="receipt to write, receipts/smoke_test.json")
    parser.add_argument("--transcript", type=Path, required=True, help="JSONL of all requests and answers")
    parser.add_argument(
        "--model-dir", type=Path, help="folder of the served model, for the comparison with transformers"
    )
    parser.add_argument("--model-receipt", type=Path, help="receipt of verify_model, recorded as this test's input")
    parser.add_argument("--prompts", help="JSONL of held-out prompts, {id, messages, answer} a line")
    parser.add_argument("--max-tokens", type=int, default=default.max_tokens, help="longest answer in tokens")
    parser.add_argument(
        "--min-format-rate", type=float, default=default.min_format_rate, help="share of well-formed held-out answers"
    )
    parser.add_argument("--concurrency", type=int, default=default.concurrency, help="requests at the same time")
    parser.add_argument(
        "--request-timeout", type=float, default=default.request_timeout_s, help="deadline of one request in seconds"
    )
    parser.add_argument("--reasoning-parser", default="deepseek_r1", help="the server's parser, or none")
    parser.add_argument("--dtype", default="auto", help="dtype the server computes in")
    parser.add_argument(
        "--logprobs-max-parameters",
        type=float,
        default=default.logprobs_max_parameters,
        help="largest model that is compared with transformers",
    )
    parser.add_argument("--no-benchmark", action="store_true", help="do not measure tokens per second")
    parser.add_argument("--time-to-ready", type=float, help="seconds the server took to start, for the receipt")
    parser.add_argument(
        "--run-dir", type=Path, help="folder of the deployment: its nodes and processes, for the receipt"
    )
    parser.add_argument("--hosts", help="nodes that serve, separated by commas, for the receipt")
    arguments = parser.parse_args()

    if arguments.model_dir and not (arguments.model_dir / "config.json").is_file():
        raise BadInputError(f"--model-dir {arguments.model_dir}: no config.json in it")
    settings = SmokeSettings(
        prompts=arguments.prompts,
        max_tokens=arguments.max_tokens,
        min_format_rate=arguments.min_format_rate,
        concurrency=arguments.concurrency,
        request_timeout_s=arguments.request_timeout,
        logprobs_max_parameters=arguments.logprobs_max_parameters,
        benchmark=not arguments.no_benchmark,
    )
    parser_name = None if arguments.reasoning_parser in ("", "none") else arguments.reasoning_parser
    cli.say(f"smoke test of {arguments.model} at {arguments.url}")
    report = smoke.run(
        arguments.url,
        arguments.model,
        settings,
        reasoning_parser=parser_name,
        model_dir=arguments.model_dir,
        transcript=arguments.transcript,
        dtype=arguments.dtype,
        api_key=os.environ.get("VLLM_API_KEY", ""),
    )
    inputs = {}
    if arguments.model_receipt:
        inputs["verify_model"] = receipts.input_entry(arguments.model_receipt)
    if arguments.prompts:
        inputs["prompts"] = receipts.input_entry(arguments.prompts)
    receipts.write(
        arguments.receipt,
        "smoke_test",
        inputs=inputs,
        settings={"model": arguments.model, "reasoning_parser": parser_name, "temperature": 0} | vars(settings),
        result={"transcript": str(arguments.transcript)},
        figures={"checks": report.checks, "skipped": report.skipped, "time_to_ready_s": arguments.time_to_ready}
        | ({"nodes": lasting.who_serves(arguments.run_dir)} if arguments.run_dir else {})
        | report.figures,
        hosts=arguments.hosts.split(",") if arguments.hosts else None,
    )
    cli.say(f"all {len(report.checks)} checks passed; receipt {arguments.receipt}")


if __name__ == "__main__":
    cli.run(main)
