"""Every command of README and docs is run, run dry, run by another test, or marked as not run; none is outdated.

Cost: about a minute, most of it dry runs of Snakemake, and one emulated cluster for the quickstart.
"""

import collections
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import docs_pages
import pytest
from project_copy import copy_of

# Blocks that no test runs. Whoever adds one says so here.
NOT_RUN = {
    "takes long": 4,
    "an excerpt": 1,
    "needs a cluster": 3,
    "needs a finished experiment": 1,
    "needs a network": 6,
    "needs root": 1,
    "needs a base model": 1,
    "needs a checkpoint": 2,
    "needs a checkpoint of the guide": 1,
    "needs a run that is going": 5,
    "needs a served base model": 1,
    "needs a format of the reader's": 1,
}
AFTER_DEMO = "run after the demo"  # by tests/chain/test_demo.py
TRANSLATION = "README.zh.md"  # its commands are README.md's, as test_text.py checks
SCRIPTS = docs_pages.PROJECT / "workflow/scripts"
ROOTS = (docs_pages.PROJECT, docs_pages.PROJECT / "workflow/deepseek_sft", docs_pages.PROJECT / "cluster")
ELSEWHERE = re.compile(r"mine|<|…|\$|^\./code/")  # made by readers, placeholders, files of the original guide

page_of = pytest.mark.parametrize("page", docs_pages.PAGES, ids=lambda page: str(page.relative_to(docs_pages.PROJECT)))


def run_blocks(page: Path) -> list[docs_pages.Block]:
    """Blocks that these tests run themselves, and files they need."""
    blocks = [block for block in docs_pages.blocks(page) if block.kind == "test"]
    return [block for block in blocks if not block.argument.startswith("tests/") and block.argument != AFTER_DEMO]


@page_of
def test_every_block_of_commands_says_how_it_is_tested(page):
    unmarked = [block.place for block in docs_pages.blocks(page) if not block.language and not block.kind]
    assert not unmarked, "put a marker before these blocks (tests/docs_pages.py), or name their language"
    for block in docs_pages.blocks(page):
        known = block.argument in ("run", "dry-run", AFTER_DEMO) or block.argument.startswith(("file ", "tests/"))
        assert block.kind != "test" or known, f"{block.place}: unknown marker {block.argument}"


def test_blocks_that_are_not_run_are_counted():
    pages = [page for page in docs_pages.PAGES if page.name != TRANSLATION]
    blocks = [block for page in pages for block in docs_pages.blocks(page) if block.kind == "not run"]
    assert collections.Counter(block.argument for block in blocks) == NOT_RUN, [block.place for block in blocks]


@page_of
def test_a_block_that_another_test_runs_is_in_that_test(page):
    for block in docs_pages.blocks(page):
        if block.kind == "test" and block.argument.startswith("tests/"):
            source = (docs_pages.PROJECT / block.argument).read_text()
            flat = re.sub(r"[\"',\[\]]+ *", " ", source)
            for words in docs_pages.split(block.text):
                assert " ".join(words) in re.sub(r" +", " ", flat), f"{block.place}: {words} is not in {block.argument}"


@pytest.mark.cluster
@pytest.mark.parametrize(
    "page",
    [page for page in docs_pages.PAGES if run_blocks(page) and page.name != TRANSLATION],
    ids=lambda page: str(page.relative_to(docs_pages.PROJECT)),
)
def test_the_blocks_of_a_page_run_in_their_order(page, project, tmp_path):
    clone = copy_of(project, tmp_path)
    (clone / ".envs").mkdir()
    for link in (project / ".envs").iterdir():
        if link.is_symlink():
            (clone / ".envs" / link.name).symlink_to(link.resolve())
    dry = tmp_path / "dry"
    dry.mkdir()
    (dry / "snakemake").write_text(f'#!/bin/bash\nexec {clone}/.envs/workflow/bin/snakemake --dry-run "$@"\n')
    (dry / "snakemake").chmod(0o755)
    lines = ["set -euo pipefail", f"cd {clone}", "real=$PATH", "trap '[ ! -d .cluster ] || cluster/vcluster down' EXIT"]
    for block in run_blocks(page):
        if block.argument.startswith("file "):
            (clone / block.argument.removeprefix("file ")).write_text(block.text)
            continue
        first = f"{dry}:" if block.argument == "dry-run" else ""
        lines += [f"echo '== {block.place}'", f"PATH={first}$real", block.text, "real=${PATH#" + first + "}"]
    environment = os.environ | {
        "PATH": f"{clone}/.envs/workflow/bin:{os.environ['PATH']}",
        "ENVS_CACHE": str((project / ".envs/workflow").resolve().parent),
    }
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    assert "Traceback" not in done.stdout + done.stderr


@functools.cache
def help_of(script: str) -> str:
    command = [sys.executable, str(SCRIPTS / script), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def targets() -> set[str]:
    files = [docs_pages.PROJECT / "Snakefile", *docs_pages.PROJECT.glob("workflow/rules/*.smk")]
    return {name for path in files for name in re.findall(r"^rule (\w+):", path.read_text(), re.MULTILINE)}


def problems_of_script(words: list[str]) -> list[str]:
    """Options of a script of ours that it does not have; a script that is not there."""
    script = Path(words[0])
    if not (SCRIPTS / script.name).is_file():
        known = len(script.parts) == 1 or any((root / script).is_file() for root in ROOTS)
        return [] if known or ELSEWHERE.search(words[0]) else [f"{script} does not exist"]
    options = {word.split("=")[0] for word in words[1:] if word.startswith("--") and word != "--"}
    known = set(re.findall(r"--[\w-]+", help_of(script.name))) if options else set()
    return [f"{script.name} has no option {option}" for option in sorted(options - known)]


def problems_of_snakemake(words: list[str]) -> list[str]:
    """Targets that are no rules; profiles and configurations that do not exist."""
    found: list[str] = []
    option = ""
    for word in words[1:]:
        if word.startswith("-"):
            option = "" if word in ("--", "-n", "-p", "--dry-run") else word
        elif option in ("--profile", "--configfile", "--forcerun", "--until", "") and not ELSEWHERE.search(word):
            if option == "--configfile" and word in targets():
                found.append(f"--configfile takes every word that follows: put {word} before it")
            elif option in ("--profile", "--configfile"):
                found += [] if (docs_pages.PROJECT / word).exists() else [f"{word} does not exist"]
            elif word not in targets():
                found.append(f"there is no rule {word}")
            option = "" if option == "--profile" else option
        elif option != "--configfile":
            option = ""
    return found


def problems(words: list[str]) -> list[str]:
    """What is outdated in a command, as far as it can be told without running it."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if not words:
        return []
    program = Path(words[0]).name
    if words[0] in ("cluster/run", "cluster/vcluster") and "--" in words:
        return problems(words[words.index("--") + 1 :])
    if program in ("python", "python3", "python3.11") and len(words) > 1:
        if words[1:3] == ["-m", "pytest"]:
            return problems(words[2:])
        return problems_of_script(words[1:]) if words[1].endswith(".py") else []
    if program.endswith(".py"):
        # Scripts are not executable: they need the interpreter of an environment.
        wrong = [f"put `python` before {words[0]}"] if len(words) > 1 and "/" in words[0] else []
        return wrong + problems_of_script(words)
    if program in ("snakemake", "smk"):
        return problems_of_snakemake(words)
    if program == "pytest":
        paths = [word for word in words[1:] if "/" in word and not ELSEWHERE.search(word)]
        return [f"{path} does not exist" for path in paths if not (docs_pages.PROJECT / path.split("::")[0]).exists()]
    if program == "make":
        made = re.findall(r"^([\w-]+):", (docs_pages.PROJECT / "Makefile").read_text(), re.MULTILINE)
        asked = [word for word in words[1:] if re.fullmatch(r"[a-z][a-z-]*", word)]
        return [f"make has no target {word}" for word in asked if word not in made]
    return []


@page_of
def test_commands_name_what_exists(page):
    found = [f"{place}: {problem}" for place, words in docs_pages.commands(page) for problem in problems(words)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python workflow/scripts/plan.py --explain", []),
        ("python workflow/scripts/plan.py --explian", ["plan.py has no option --explian"]),
        ("workflow/scripts/plan.py --explain", ["put `python` before workflow/scripts/plan.py"]),
        ("python workflow/scripts/none.py", ["workflow/scripts/none.py does not exist"]),
        ("snakemake --profile profiles/demo trian", ["there is no rule trian"]),
        ("snakemake --configfile <yours> train", ["--configfile takes every word that follows: put train before it"]),
        ("snakemake -n train --profile profiles/none", ["profiles/none does not exist"]),
        ("smk --forcerun smoke_tset", ["there is no rule smoke_tset"]),
        ("cluster/run --nodes 4 -- snakemake none", ["there is no rule none"]),
        ("pytest -s tests/none.py", ["tests/none.py does not exist"]),
        ("make dmeo", ["make has no target dmeo"]),
    ],
)
def test_an_outdated_command_is_found(command, expected):
    assert problems(command.split()) == expected
