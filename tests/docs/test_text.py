"""Links, quoted messages, pictures, the translation of the README, and the table of capabilities are current."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import docs_pages
import pytest
import yaml

PROJECT = docs_pages.PROJECT
TRANSLATED = (PROJECT / "README.md", PROJECT / "README.zh.md")
IMAGES = PROJECT / "docs/images"

page_of = pytest.mark.parametrize("page", docs_pages.PAGES, ids=lambda page: str(page.relative_to(PROJECT)))


@page_of
def test_links_lead_to_files_and_headings_that_exist(page):
    broken = []
    for line, target in docs_pages.links(page):
        if re.match(r"[a-z]+:", target):
            continue  # other sites are not asked
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        headed = not anchor or (file.suffix == ".md" and file.exists() and anchor in docs_pages.anchors(file))
        if not file.exists() or not headed:
            broken.append(f"line {line}: {target}")
    assert not broken


def test_every_page_is_reached_from_the_readme():
    reached, ahead = set(), [PROJECT / "README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        targets = [(page.parent / target.split("#")[0]).resolve() for _, target in docs_pages.links(page)]
        ahead += [file for file in targets if file.suffix == ".md" and file.exists() and file not in reached]
    assert set(docs_pages.PAGES) - reached == set()


def skeleton(page: Path) -> dict[str, list]:
    """What both languages have in common: everything but the words."""
    code = [(b.language, b.kind, b.argument, re.sub(r" *#.*", "", b.text)) for b in docs_pages.blocks(page)]
    spans = [token.content for _, token in docs_pages.inlines(page) if token.type == "code_inline"]
    return {
        "headings": [level for level, _ in docs_pages.headings(page)],
        "blocks": code,
        "links": [target.replace(".zh.", ".") for _, target in docs_pages.links(page)],
        "tables": [len(row) for row in docs_pages.table_rows(page)],
        "first cells": [row[0] for row in docs_pages.table_rows(page) if row[0].startswith("`")],
        "code": sorted(spans),
    }


def test_both_readmes_have_the_same_headings_commands_links_and_tables():
    english, chinese = (skeleton(page) for page in TRANSLATED)
    for part, expected in english.items():
        assert chinese[part] == expected, part


def texts(node: ast.AST) -> str:
    """A string of the code, … for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(texts(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return texts(node.left) + texts(node.right)
    return "…"


def test_messages_that_the_docs_quote_are_in_the_code():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PROJECT.glob("workflow/**/*.py")]
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    known = "\n".join({texts(node) for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)})
    rows = docs_pages.table_rows(PROJECT / "docs/troubleshooting.md")
    begin, end = rows.index(["message", "cause", "fix"]), rows.index(["symptom", "cause", "fix"])
    quoted = [row[0].strip("`") for row in rows[begin:end] if row[0] != "message"]
    assert len(quoted) > 40
    unknown = [q for q in quoted if not re.search(r"[^\n]*".join(map(re.escape, q.split("…"))), known)]
    assert not unknown


@pytest.mark.parametrize(
    ("program", "names"), [("draw_flow.py", ["flow.svg", "flow.zh.svg"]), ("draw_terminal.py", ["demo.svg"])]
)
def test_the_drawn_pictures_are_the_committed_ones(program, names, tmp_path):
    subprocess.run([sys.executable, str(IMAGES / program), str(tmp_path)], check=True)
    for name in names:
        assert (tmp_path / name).read_text() == (IMAGES / name).read_text()


@pytest.mark.parametrize("image", sorted(IMAGES.glob("*.svg")), ids=lambda path: path.name)
def test_pictures_follow_light_and_dark_and_load_nothing(image):
    text = image.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    assert "<title>" in text
    assert not re.search(r"(href|src)=|url\((?!#)|@import|<script", text)


def test_each_capability_has_a_command_a_metric_and_where_it_was_run():
    entries = yaml.safe_load((PROJECT / "docs/status.yaml").read_text(encoding="utf-8"))
    names = [entry["capability"] for entry in entries]
    assert len(set(names)) == len(names)
    for entry in entries:
        assert set(entry) - {"cpu", "gpu"} == {"capability", "command", "metric"}, entry["capability"]
        assert entry.keys() & {"cpu", "gpu"}, entry["capability"]
        assert all(isinstance(value, str) and value.strip() for value in entry.values()), entry["capability"]
        for path in re.findall(r"(?:tests|benchmarks|workflow|config|profiles)/[\w./*-]+", entry["command"]):
            assert list(PROJECT.glob(path)), f"{entry['capability']}: {path}"
