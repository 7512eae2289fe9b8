"""The documentation as its tests see it: pages, headings, links, blocks with their markers, and commands.

A block without a language is a block of commands. It has a marker in front, an HTML comment that readers do not see:

    <!-- test: run -->                          run by tests/docs, as it stands, after the page's earlier ones
    <!-- test: dry-run -->                      the same, but every snakemake in it is given --dry-run
    <!-- test: run after the demo -->           run by tests/chain, with the page's other blocks, none of them dry
    <!-- test: file NAME -->                    what stands in it is written to NAME first (any language)
    <!-- test: tests/chain/test_demo.py -->     another test runs it
    <!-- not run: REASON -->                    no test runs it; tests/docs counts them by reason
"""

import functools
import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

PROJECT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *PROJECT.glob("*.md"),
        *PROJECT.glob("docs/*.md"),
        *(PROJECT / f"{name}/README.md" for name in ("config", "envs", "cluster")),
    ]
)
MARKER = re.compile(r"<!-- (test|not run): (.+?) -->")
SEPARATORS = {";", "&&", "||", "|", "&"}


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        line: of the page, from 1.
        kind: ``test`` or ``not run``; empty without a marker.
        argument: what follows it in the marker.
    """

    page: Path
    line: int
    language: str
    text: str
    kind: str
    argument: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(PROJECT)}:{self.line}"


@functools.cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[Block]:
    """Blocks of code with the markers before them."""
    found = []
    before = None
    for token in tokens(page):
        if token.type in ("fence", "code_block"):
            marker = MARKER.fullmatch(before.content.strip()) if before and before.type == "html_block" else None
            kind, argument = marker.groups() if marker else ("", "")
            found.append(Block(page, token.map[0] + 1, token.info.strip(), token.content, kind, argument))
        before = token
    return found


def inlines(page: Path) -> Iterator[tuple[int, Token]]:
    """Line and token of every piece of running text."""
    line = 0
    for token in tokens(page):
        if token.map:
            line = token.map[0] + 1
        for child in token.children or ():
            yield line, child


def links(page: Path) -> list[tuple[int, str]]:
    """Line and target of links and images."""
    names = {"link_open": "href", "image": "src"}
    return [(line, str(t.attrs[names[t.type]])) for line, t in inlines(page) if t.type in names]


def headings(page: Path) -> list[tuple[str, str]]:
    """Level (``h2``) and text of every heading."""
    pairs = itertools.pairwise(tokens(page))
    return [(opened.tag, text.content) for opened, text in pairs if opened.type == "heading_open"]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    seen: dict[str, int] = {}
    found = set()
    for _, text in headings(page):
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if slug in seen else slug)
        seen[slug] = seen.get(slug, 0) + 1
    return found


def table_rows(page: Path) -> list[list[str]]:
    """Cells of every row of every table, head included, as written."""
    rows: list[list[str]] = []
    inside = False
    for token in tokens(page):
        if token.type == "tr_open":
            rows.append([])
        if token.type in ("th_open", "td_open"):
            inside = True
        elif token.type == "inline" and inside:
            rows[-1].append(token.content)
            inside = False
    return rows


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Place and words of every command in blocks of commands and in running text."""
    for block in blocks(page):
        if not block.language:
            yield from ((block.place, words) for words in split(block.text))
    for line, token in inlines(page):
        if token.type == "code_inline":
            yield from ((f"{page.relative_to(PROJECT)}:{line}", words) for words in split(token.content))


def split(text: str) -> list[list[str]]:
    """Simple commands of shell text, each as its words; here-documents and what is no shell text are left out."""
    text = re.sub(r"<< '(\w+)'\n.*?\n\1\n", "\n", text, flags=re.DOTALL).replace("\\\n", " ")
    found: list[list[str]] = []
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:
            continue
        current: list[str] = []
        for word in [*words, ";"]:
            if word in SEPARATORS:
                found += [current] if current else []
                current = []
            else:
                current.append(word)
    return found
