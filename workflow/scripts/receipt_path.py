"""Print a path that a receipt names, after checking that the receipt is of that rule and the path is still there."""

from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, receipts
from deepseek_sft.errors import BadInputError


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("receipt", type=Path)
    parser.add_argument("rule", help="rule that wrote the receipt")
    parser.add_argument("name", help="name of the result, such as checkpoint")
    arguments = parser.parse_args()
    result = receipts.read(arguments.receipt, arguments.rule)["result"]
    if arguments.name not in result:
        raise BadInputError(f"{arguments.receipt} names no {arguments.name}, only {', '.join(result)}")
    print(result[arguments.name])


if __name__ == "__main__":
    cli.run(main)
