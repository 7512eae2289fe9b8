"""Draw demo.svg, an excerpt of `make demo` as a terminal shows it, from demo.txt, the text of a real run.

    python docs/images/draw_terminal.py [FOLDER]

Lines of demo.txt that begin with `$ ` were typed; … stands for lines and leading folders that were left out. Both files
are committed; a test checks that they belong together.
"""

import sys
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).resolve().parent
LETTER, LINE, MARGIN = 8.4, 20, 16

STYLE = """
  svg { --paper: #f6f8fa; --edge: #d1d9e0; --ink: #1f2328; --typed: #0550ae; }
  @media (prefers-color-scheme: dark) { svg { --paper: #0d1117; --edge: #3d444d; --ink: #e6edf3; --typed: #79c0ff; } }
  rect { fill: var(--paper); stroke: var(--edge); }
  text { font: 14px ui-monospace, "DejaVu Sans Mono", monospace; fill: var(--ink); white-space: pre; }
  .typed { fill: var(--typed); font-weight: 600; }
"""


def draw(text: str) -> str:
    """The picture of a terminal with this text, as SVG text."""
    lines = text.rstrip("\n").split("\n")
    width = round(max(map(len, lines)) * LETTER) + 2 * MARGIN
    height = len(lines) * LINE + 2 * MARGIN
    rows = []
    for number, line in enumerate(lines):
        kind = ' class="typed"' if line.startswith("$ ") else ""
        rows.append(f'<text{kind} x="{MARGIN}" y="{MARGIN + 14 + number * LINE}">{escape(line)}</text>')
    body = "\n".join(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="make demo">\n'
        f"<title>Excerpt of make demo</title>\n<style>{STYLE}</style>\n"
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    text = (HERE / "demo.txt").read_text(encoding="utf-8")
    (folder / "demo.svg").write_text(draw(text), encoding="utf-8")


if __name__ == "__main__":
    main()
