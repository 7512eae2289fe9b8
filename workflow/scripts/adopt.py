"""Make a copied or renamed experiment folder an experiment of its own: its receipts name what lies in it from now on.

    cp -rp results/first results/second
    adopt.py results/second              then: experiment: second

The original is not touched. Exit codes: 0 done; 2 it is no copy, or something was not copied along.
"""

from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import adoption, cli


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("results", type=Path, help="results/<experiment>, the copy")
    arguments = parser.parse_args()
    for path in adoption.adopt(arguments.results):
        cli.say(f"{path}: its paths lead into {arguments.results} now")


if __name__ == "__main__":
    cli.run(main)
