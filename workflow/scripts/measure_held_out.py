"""Measure a served model on held-out samples: the loss on their references, and its answers.

For base models too large for transformers: serve the base with the settings that the tuned model gets, run this once,
and give its output as smoke_test.base_measured. The file names the token sequences it speaks of, so that one made for
other samples, another template or another context is refused, not compared. An API key is read from VLLM_API_KEY.
"""

import os
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, files
from deepseek_sft.evaluation import base_measurement
from deepseek_sft.settings import options
from deepseek_sft.settings.smoke_settings import SmokeSettings


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--url", required=True, help="base URL of the server, http://host:port")
    parser.add_argument("--model", required=True, help="name it serves the model under")
    parser.add_argument("--prompts", required=True, help="JSONL of held-out samples")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the model, or of its tokenizer")
    parser.add_argument("--template", required=True, help="template of training, data.template")
    parser.add_argument("--output", type=Path, required=True, help="measurement to write, JSON")
    parser.add_argument("--reasoning-parser", default="deepseek_r1", help="the server's parser, or none")
    parser.add_argument("--no-answers", action="store_true", help="measure the loss only")
    options.add(parser, SmokeSettings, "max_tokens", "concurrency", "request_timeout_s")
    arguments = parser.parse_args()

    files.require_writable(arguments.output)
    settings = SmokeSettings(
        prompts=arguments.prompts,
        template=arguments.template,
        max_tokens=arguments.max_tokens,
        concurrency=arguments.concurrency,
        request_timeout_s=arguments.request_timeout_s,
    )
    measured = base_measurement.measure_served(
        arguments.url,
        arguments.model,
        arguments.tokenizer,
        settings,
        reasoning_parser=None if arguments.reasoning_parser in ("", "none") else arguments.reasoning_parser,
        answers=not arguments.no_answers,
        api_key=os.environ.get("VLLM_API_KEY", ""),
    )
    measured.write(arguments.output)
    cli.say(f"loss {measured.loss:.4f} over {measured.tokens} tokens of {len(measured.samples)} samples")


if __name__ == "__main__":
    cli.run(main)
