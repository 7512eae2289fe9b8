"""Ask a served model the tasks of section `evaluate` that have no result yet, by lm-eval in its own environment.

Started by serve_node.py beside the server. Results are kept in the experiment's folder, those of a base beside the
experiments; an answer that an interrupted start has left is not asked for again. Gates are judged by evaluate.py. With
--after-smoke-test a failure ends nothing: its reason is left for evaluate.py, since the smoke test has passed. An API
key is read from VLLM_API_KEY.
"""

from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli
from deepseek_sft.errors import BadInputError, StageError
from deepseek_sft.serving import settings as settings_file
from deepseek_sft.task_evaluation import measure, stage


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--url", required=True, help="base URL of the server, http://host:port")
    parser.add_argument("--settings", type=Path, required=True, help="settings.json of the deployment")
    parser.add_argument("--results", type=Path, required=True, help="results/<experiment>")
    parser.add_argument("--reasoning-parser", default="none", help="the server's parser, or none")
    parser.add_argument("--base", action="store_true", help="the base is served, not the trained model")
    parser.add_argument("--after-smoke-test", action="store_true", help="leave a failure's reason and end well")
    arguments = parser.parse_args()

    settings = settings_file.read(arguments.settings)
    tasks = settings.evaluation
    if tasks is None:
        raise BadInputError(f"{arguments.settings} has no evaluation")
    rule = stage.BASE if arguments.base else stage.MODEL
    own_parser = None if arguments.reasoning_parser in ("", "none") else arguments.reasoning_parser
    served = measure.Served(
        arguments.url, settings.served_model_name, own_parser, tasks.concurrency, tasks.request_timeout_s
    )
    reason = stage.reason(arguments.results)
    reason.unlink(missing_ok=True)  # that of an earlier start says nothing about this one
    cli.say(f"evaluation of {settings.served_model_name} at {arguments.url}: {', '.join(tasks.by_name)}")
    try:
        whose = stage.subject(tasks, rule, stage.receipt_of(arguments.results, rule))
        measure.measure(tasks.python, served, whose, tasks.by_name, stage.folder(arguments.results, rule))
    except StageError as error:
        if not arguments.after_smoke_test:
            raise
        stage.keep_reason(arguments.results, error)
        cli.say(f"warning: the model is not evaluated: {error}")


if __name__ == "__main__":
    cli.run(main)
