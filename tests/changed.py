"""Linters and unit tests of what changed: `make check`, before every commit; the whole suite is CI's.

    changed.py [COMMIT]     against where this branch left COMMIT (default: main), what is not committed included

A changed module runs the unit tests that import it, or are named after it; any other file those that speak of it by
name. What reaches further is found by `make test`.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
LIBRARY = Path("workflow/deepseek_sft")
MOST = 8  # files of tests that one changed file may ask for: more would take longer than a minute


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=True).stdout


def changed(commit: str) -> list[Path]:
    """Files that differ from where this branch left ``commit``, new ones included; removed ones as they were named."""
    base = git("merge-base", "HEAD", commit).strip()
    names = git("diff", "--name-only", "--no-renames", base).splitlines()
    return [
        Path(name) for name in dict.fromkeys(names + git("ls-files", "--others", "--exclude-standard").splitlines())
    ]


def module_of(file: Path) -> str:
    """``deepseek_sft.data.tokens`` of its file; a helper of tests by its own name."""
    inside = file.relative_to("workflow" if LIBRARY in file.parents else "tests").with_suffix("")
    return ".".join(inside.parts[:-1] if inside.name == "__init__" else inside.parts)


def imported(test: Path) -> Iterator[str]:
    """Modules that a file imports, each also as it would be named with what is taken from it."""
    for node in ast.walk(ast.parse(test.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_named_after(test: Path, module: str) -> bool:
    """For ``deepseek_sft.data.tokens``: ``test_data_tokens.py``, ``test_tokens.py`` and ``data/test_tokens.py``."""
    words = "_".join(test.relative_to("tests/unit").with_suffix("").parts).replace("test_", "")
    parts = module.split(".")
    return words in ("_".join(parts[1:]), parts[-1])


def tests_of(files: list[Path]) -> tuple[list[Path], list[str]]:
    """Unit tests that the changed files ask for, in order; and what is left to the whole suite, as sentences."""
    tests = [path.relative_to(PROJECT) for path in sorted((PROJECT / "tests/unit").rglob("test_*.py"))]
    texts = {test: (PROJECT / test).read_text(encoding="utf-8") for test in tests}
    imports = {test: set(imported(PROJECT / test)) for test in tests}
    found, left = set(tests) & set(files), []
    for file in files:
        is_helper = file.parts[0] == "tests" and file.suffix == ".py" and not file.name.startswith("test_")
        named: set[Path] = set()
        if is_helper or (LIBRARY in file.parents and file.suffix == ".py"):
            module = module_of(file)
            named = {test for test in tests if is_named_after(test, module)}
            users = {test for test in tests if module in imports[test]} - named
        elif "golden" in file.parts or file.suffix == ".j2":
            users = {test for test in tests if "golden" in texts[test]}
        elif file.parts[0] in ("workflow", "profiles", "config", "envs"):
            name = file.stem if file.suffix == ".py" else file.name  # scripts are also imported
            users = {test for test in tests if name in texts[test]}
        else:
            continue
        found |= named
        if len(users) > MOST:
            left.append(f"{file}: {len(users)} files of tests use it, which `make test` runs")
        else:
            found |= users
    return [test for test in tests if test in found], left


def linters(files: list[Path]) -> Iterator[list[str]]:
    """Commands of the linters that look at such files; `make lint` looks at all."""
    there = [str(file) for file in files if (PROJECT / file).is_file()]
    for end, *command in (
        (".py", "ruff", "check", "--quiet"),
        (".py", "ruff", "format", "--check", "--quiet"),
        (".smk", "snakefmt", "--check"),
        (".sh", "shellcheck", "--external-sources"),
        ("", "codespell"),
    ):
        if names := [name for name in there if name.endswith(end)]:
            yield [*command, *names]
    if any(name.endswith(".schema.yaml") for name in there):
        yield [sys.executable, "workflow/scripts/document_config.py", "--check"]


def main() -> int:
    files = changed(sys.argv[1] if len(sys.argv) > 1 else "main")
    tests, left = tests_of(files)
    print(
        f"{len(files)} changed files; unit tests: {', '.join(test.stem for test in tests) or 'none'}",
        *left,
        sep="\n",
        flush=True,
    )
    failed = [command[0] for command in linters(files) if subprocess.run(command, cwd=PROJECT).returncode]
    if tests:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "--dist", "loadfile", *map(str, tests)]
        failed += ["pytest"] if subprocess.run(command, cwd=PROJECT).returncode else []
    print(f"failed: {', '.join(failed)}" if failed else "all is well with what changed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
