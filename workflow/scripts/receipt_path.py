"""Print a path that a receipt names, after checking that the receipt is of that rule and the path is still there.

With --for-stage it stands as an argument of stage.sh: what is wrong is printed in place of the path, since a shell goes
on with the next command when a substitution fails, and stage.sh ends with it.
"""

import argparse
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, receipts
from deepseek_sft.errors import BadInputError, StageError

NO_PATH = "no path: "  # as stage.sh knows it


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("receipt", type=Path)
    parser.add_argument("rule", help="rule that wrote the receipt")
    parser.add_argument("name", help="name of the result, such as checkpoint")
    parser.add_argument("--for-stage", action="store_true", help="print what is wrong as an argument of stage.sh")
    arguments = parser.parse_args()
    try:
        print(path(arguments))
    except StageError as error:
        if not arguments.for_stage:
            raise
        print(f"{NO_PATH}error: {error}")


def path(arguments: argparse.Namespace) -> str:
    """What the receipt names.

    Raises:
        BadInputError: no receipt of that rule, it names no such result, or that is not there any more.
    """
    result = receipts.read(arguments.receipt, arguments.rule)["result"]
    if arguments.name not in result:
        raise BadInputError(f"{arguments.receipt} names no {arguments.name}, only {', '.join(result)}")
    if not isinstance(result[arguments.name], str):
        raise BadInputError(
            f"{arguments.receipt}: {arguments.name} is no path", f"snakemake --forcerun {arguments.rule}"
        )
    return result[arguments.name]


if __name__ == "__main__":
    cli.run(main)
