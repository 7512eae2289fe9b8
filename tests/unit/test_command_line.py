"""Mistakes on the command line and in the files it names are answered before Snakemake starts."""

from pathlib import Path

import pytest

from deepseek_sft import command_line


@pytest.fixture
def project_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the project's, and the working directory."""
    for name in ("config/experiments", "workflow/rules", "profiles/local", "data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "Snakefile").write_text("rule all:\n    input: []\n\nrule data:\n    input: []\n")
    (tmp_path / "profiles/local/config.yaml").write_text("executor: local\ncores: all\n")
    (tmp_path / "config/experiments/mine.yaml").write_text("experiment: mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    return tmp_path


MINE = "config/experiments/mine.yaml"


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = command_line.check(list(words))
    return code, capsys.readouterr().err


def test_right_command_is_left_alone(project_folder, capsys):
    assert answer(capsys, "data", "--profile", "profiles/local", "--configfile", MINE) == (0, "")


@pytest.mark.parametrize(
    ("text", "place", "fix"),
    [
        ("experiment: mine\ndata:\n  sources: [a\n  max_length: 3\n", "line 4, column 13", "close the bracket"),
        ("experiment: mine\ndata:\n\tmax_length: 3\n", "line 3, column 1", "spaces, not tabs"),
        ("experiment: mine\ntrain:\n  learning_rate: 1: 2\n", "line 3, column 19", "quote a text"),
        ("experiment: mine\ntrain:\n  a: 1\n b: 2\n", "line 4, column 2", "indented alike"),
        ("experiment: mine\n- a\n", "line 2, column 1", "indented alike"),
        ("experiment: \x07\n", "line 1", "remove that character"),
        ("just words\n", "holds no keys", "key: value"),
    ],
)
def test_broken_yaml_is_told_with_line_and_column(project_folder, capsys, text, place, fix):
    (project_folder / MINE).write_text(text)
    code, said = answer(capsys, "-n", "--profile", "profiles/local", "--configfile", MINE)
    assert code == 2
    assert f"error: {MINE}" in said
    assert place in said
    assert fix in said
    assert len(said.splitlines()) <= 10


def test_broken_profile_is_told_with_its_line(project_folder, capsys):
    (project_folder / "profiles/local/config.yaml").write_text("executor: local\n  cores: all\n")
    code, said = answer(capsys, "--profile", "profiles/local")
    assert code == 2
    assert "profiles/local/config.yaml, line 2" in said


def test_target_after_configfile_is_told_with_the_right_command(project_folder, capsys):
    code, said = answer(capsys, "--profile", "profiles/local", "--configfile", MINE, "data")
    assert code == 2
    assert f"snakemake data --profile profiles/local --configfile {MINE}" in said


def test_missing_configuration_is_told_with_a_near_name(project_folder, capsys):
    code, said = answer(capsys, "--profile", "profiles/local", "--configfile", "config/experiments/mein.yaml")
    assert code == 2
    assert f"did you mean {MINE}?" in said


def test_mistyped_profile_is_told_with_a_near_name(project_folder, capsys):
    code, said = answer(capsys, "--profile", "profiles/locals")
    assert code == 2
    assert "did you mean profiles/local?" in said


def test_no_profile_is_refused_with_those_there_are(project_folder, capsys):
    code, said = answer(capsys, "--configfile", MINE)
    assert code == 2
    assert "--profile profiles/slurm" in said


def test_cores_without_a_profile_are_warned_of(project_folder, capsys):
    code, said = answer(capsys, "--cores", "4", "--configfile", MINE)
    assert code == 0
    assert said.startswith("warning: no profile is given")


@pytest.mark.parametrize("words", [["-n"], ["--unlock"], ["--version"], ["--list-rules"], ["-np"], ["--help"]])
def test_looking_needs_no_profile(project_folder, capsys, words):
    assert answer(capsys, *words) == (0, "")


def test_executor_comes_from_command_line_or_profile(project_folder):
    (project_folder / "profiles/local/config.yaml").write_text("executor: slurm\n")
    assert command_line.executor(["-n", "--profile", "profiles/local"]) == "slurm"
    assert command_line.executor(["-n", "--profile", "profiles/local", "--executor", "local"]) == "local"
    assert command_line.executor(["-n"]) == "local"
