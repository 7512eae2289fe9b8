"""Serve a model with vLLM; started once on every node of an allocation, or once without Slurm.

The node with SLURM_NODEID 0 is the head: it offers the API. With --smoke-test it tests the API once it answers, writes
the receipt and ends with the test's exit code; with --evaluate it then asks the tasks of section `evaluate` that have
no result yet. Without either it prints URL and a ready request, writes endpoint.json into
the run folder and serves until it is stopped (a signal, or a file named `stop` in the run folder). A lasting deployment
asks its clients for a key; see serve.api_key_file.

The first process that dies, on any node, ends all nodes with exit code 5 (2 where its log names a cause that a further
start would meet again) and is shown with its last lines. Whatever happens, nothing keeps running.
"""

import os
import sys
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, receipts
from deepseek_sft.convert import base_model, servable
from deepseek_sft.errors import BadInputError
from deepseek_sft.serving import parsers, versions
from deepseek_sft.serving import settings as settings_file
from deepseek_sft.serving.command_listing import listing
from deepseek_sft.serving.node import Node
from deepseek_sft.serving.vllm_commands import Programs
from deepseek_sft.settings import options as command_line
from deepseek_sft.settings.smoke_settings import record_beside


def main() -> int:
    parser = cli.parser(__doc__)
    served = parser.add_mutually_exclusive_group(required=True)
    served.add_argument("--model-receipt", type=Path, help="receipt of verify_model: the model to serve")
    served.add_argument("--base-receipt", type=Path, help="receipt of prepare_model: the base to serve, for --evaluate")
    parser.add_argument("--settings", type=Path, required=True, help="serve/settings.json, rendered from the config")
    parser.add_argument("--run-dir", type=Path, help="folder of this deployment, shared by the nodes")
    parser.add_argument(
        "--show-commands",
        type=int,
        metavar="NODES",
        help="start nothing: print what NODES nodes would run, with --smoke-test for it",
    )
    parser.add_argument("--smoke-test", type=Path, help="test the API, write this receipt, and end")
    parser.add_argument(
        "--evaluate", type=Path, metavar="RESULTS", help="folder of the experiment: ask its tasks, and end"
    )
    parser.add_argument(
        "--transcript", type=Path, help="the test's transcript [transcript.jsonl beside the run folder]"
    )
    arguments = parser.parse_args()
    if arguments.base_receipt and (arguments.smoke_test or not arguments.evaluate):
        parser.error("--base-receipt is for --evaluate alone")
    if not (arguments.run_dir or arguments.show_commands):
        parser.error("--run-dir is required")

    settings = settings_file.read(arguments.settings)
    if arguments.base_receipt:
        model = base_to_serve(arguments.base_receipt, arguments.run_dir)
    else:
        model = receipts.read(arguments.model_receipt, "verify_model")["result"].get("model")
        if not model or not Path(model, "config.json").is_file():
            raise BadInputError(f"{arguments.model_receipt} names no model folder with a config.json under `model`")
    settings = parsers.settled(settings, Path(model))
    if arguments.show_commands:
        shown = settings if arguments.smoke_test else settings.lasting
        print(listing(shown, arguments.show_commands, model, versions.installed()), end="")
        return 0
    transcript = arguments.transcript or arguments.run_dir.parent / "transcript.jsonl"
    if arguments.smoke_test and os.environ.get("SLURM_NODEID", "0") == "0":
        # Those of an earlier model say nothing about this one, which may not even start.
        for earlier in (transcript, record_beside(transcript)):
            earlier.unlink(missing_ok=True)

    def checks(url: str, seconds: float, nodes: list[str]) -> dict[str, list[str]]:
        commands = {"smoke_test": smoke_test(url, seconds, nodes)} if arguments.smoke_test else {}
        if arguments.evaluate and settings.evaluation:
            commands["evaluate"] = evaluate(url)
        return commands

    def evaluate(url: str) -> list[str]:
        program = Path(__file__).with_name("evaluate_served.py")
        words = [sys.executable, str(program), f"--url={url}", f"--settings={arguments.settings}"]
        words += ["--results", str(arguments.evaluate), f"--reasoning-parser={settings.reasoning_parser or 'none'}"]
        words += ["--base"] if arguments.base_receipt else []
        return words + (["--after-smoke-test"] if arguments.smoke_test else [])

    def smoke_test(url: str, seconds: float, nodes: list[str]) -> list[str]:
        options = {
            "url": url,
            "model": settings.served_model_name,
            "model-dir": model,
            "model-receipt": arguments.model_receipt,
            "receipt": arguments.smoke_test,
            "transcript": transcript,
            "max-model-len": settings.max_model_len,
            "reasoning-parser": settings.reasoning_parser or "none",
            "dtype": settings.dtype,
            "time-to-ready": f"{seconds:.1f}",
            "hosts": ",".join(nodes),
            "run-dir": arguments.run_dir,
        }
        if settings.tool_call_parser:
            options["tool-call-parser"] = settings.tool_call_parser
        words = [f"--{name}={value}" for name, value in options.items()]
        words += command_line.words(settings.smoke_test)
        return [sys.executable, str(Path(__file__).with_name("smoke_test.py")), *words]

    programs = Programs.beside(sys.executable)
    ends = arguments.smoke_test or arguments.evaluate
    return Node(settings, Path(model), arguments.run_dir, programs, checks if ends else None).run()


def base_to_serve(receipt: Path, run_dir: Path | None) -> str:
    """The base as servers read it, linked in the run folder by each node for itself; without one, as it lies."""
    base = receipts.read(receipt, "prepare_model", {"result": {"base": str}})["result"]["base"]
    folder = run_dir / f"base-{os.environ.get('SLURM_NODEID', '0')}" if run_dir else Path(base)
    if not folder.exists():
        servable.link(base_model.open_model(Path(base)), folder)
    return str(folder)


if __name__ == "__main__":
    cli.run(main)
