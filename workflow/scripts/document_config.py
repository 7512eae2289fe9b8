"""Write config/README.md from the settings, or check that it is current (--check)."""

import argparse
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, files
from deepseek_sft.errors import BadInputError
from deepseek_sft.settings import document

README = Path(__file__).resolve().parents[2] / "config" / "README.md"


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=False, help="only compare")
    arguments = parser.parse_args()
    text = document.documentation()
    if not arguments.check:
        files.write_text(README, text)
    elif not README.exists() or README.read_text(encoding="utf-8") != text:
        raise BadInputError(f"{README.name} of config/ is not current", "python workflow/scripts/document_config.py")


if __name__ == "__main__":
    cli.run(main)
