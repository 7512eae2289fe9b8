"""Rooms of the library: what each may import, and what its README says of it."""

import ast
import graphlib
import re
from collections import defaultdict
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[2] / "workflow/deepseek_sft"
# Package → packages that it imports. A new arrow is a decision: write it here, and into the package's README.
IMPORTS: dict[str, set[str]] = {
    "cluster_jobs": set(),
    "convert": {"data", "families", "tensors"},
    "data": {"families"},
    "evaluation": {"data", "families", "serving", "settings"},
    "families": {"tensors"},
    "model": {"families", "tensors"},
    "planning": {"convert", "data", "families", "model", "slurm", "tensors"},
    "preflight": {"settings", "slurm", "tensors"},
    "report": {"cluster_jobs", "data", "training"},
    "serving": {"cluster_jobs", "convert", "data", "families", "settings", "slurm", "tensors"},
    "settings": {"data", "planning", "tensors"},
    "site": set(),
    "slurm": {"cluster_jobs", "site"},
    "task_evaluation": {"evaluation", "settings"},
    "tensors": set(),
    "training": {"cluster_jobs", "convert", "data", "families", "model", "planning", "settings", "slurm", "tensors"},
    "verify": {"convert", "data", "families", "tensors"},
}
SAME_EVERYWHERE = {"__init__", "settings", "stage", "config"}  # the same thing of another stage or engine


def packages() -> list[str]:
    return sorted(path.parent.name for path in LIBRARY.glob("*/__init__.py"))


def arrows() -> dict[str, set[str]]:
    """Package → packages that its modules import, functions included."""
    found = defaultdict(set)
    for path in LIBRARY.glob("*/**/*.py"):
        parts = path.relative_to(LIBRARY).parts
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            names = node.module.split(".") if node.module else []
            if node.level == len(parts):  # from the library's top
                targets = [names[0]] if names else [alias.name for alias in node.names]
            elif names[:1] == ["deepseek_sft"] and not node.level:
                targets = names[1:2] or [alias.name for alias in node.names]
            else:
                continue
            found[parts[0]].update(target for target in targets if target in IMPORTS and target != parts[0])
    return found


def test_packages_import_what_is_written_here_and_nothing_else():
    found = arrows()
    assert {name: found.get(name, set()) for name in packages()} == IMPORTS


def test_no_two_packages_import_each_other():
    graphlib.TopologicalSorter(IMPORTS).prepare()


@pytest.mark.parametrize("package", packages())
def test_a_packages_readme_is_short_and_names_files_that_are_there(package):
    text = (LIBRARY / package / "README.md").read_text()
    assert len(text.splitlines()) <= 30
    assert "Read first:" in text and "Must not import:" in text
    for name in re.findall(r"`([a-z0-9_/]+\.py)`", text):
        assert (
            (LIBRARY / package / name).is_file() or (LIBRARY / name).is_file() or (LIBRARY.parents[1] / name).is_file()
        )


def test_no_two_files_of_one_name_mean_other_things():
    places = defaultdict(list)
    for path in LIBRARY.glob("**/*.py"):
        if path.stem not in SAME_EVERYWHERE and path.parent.name != "settings":
            places[path.stem].append(path.relative_to(LIBRARY).as_posix())
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
