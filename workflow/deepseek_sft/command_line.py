"""A look at Snakemake's command line, and at the files it names, before Snakemake itself starts.

Snakemake reads configuration files and profile before it reads any Snakefile: what is wrong there ends in a traceback,
or in a sentence without a place. Called by envs/bin/workflow/snakemake.
"""

import dataclasses
import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from . import strict_yaml
from .errors import BadInputError

CONFIG, PROFILE = ("--configfile", "--configfiles"), ("--profile", "--workflow-profile")
CORES = ("--cores", "-c", "--jobs", "-j", "--local-cores")
PROFILES = (
    "--profile profiles/slurm on a cluster (a copy of it that says what yours has), --profile profiles/local on this "
    "machine, --profile profiles/demo on the emulated cluster"
)
# Options with which Snakemake runs no job, so that it needs no profile.
LOOKS = re.compile(
    r"-[a-zA-Z]*n[a-zA-Z]*|--dry-?run|-h|--help|-v|--version|--unlock|--lint|-l|-S|-D|-d|--dag|--rulegraph|--filegraph|--d3dag|--summary|"
    r"--(list|detailed|report|cleanup|delete|archive|touch|print|generate|export).*"
)


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What matters here of a command line.

    Attributes:
        words: all of it, without the program's name.
        configfiles: values of --configfile.
        profile: value of --profile; None without one.
    """

    words: list[str]
    configfiles: list[str]
    profile: str | None

    @property
    def looks(self) -> bool:
        """Whether no job would run."""
        return any(LOOKS.fullmatch(word.partition("=")[0]) for word in self.words)

    @property
    def has_cores(self) -> bool:
        """Whether it says how much may run at once, which Snakemake insists on."""
        return any(word.partition("=")[0] in CORES or re.fullmatch(r"-[cj](\d+|all)", word) for word in self.words)


def parse(words: list[str]) -> CommandLine:
    """Split a command line as Snakemake does: --configfile takes every word up to the next option."""
    configfiles: list[str] = []
    profile, option = None, ""
    for word in words:
        if word.startswith("-"):
            option, separator, value = word.partition("=")
            if not separator:
                continue
        else:
            value = word
        if option in CONFIG:
            configfiles.append(value)
        elif option in PROFILE:
            profile, option = value, ""
    return CommandLine(words, configfiles, profile)


def executor(words: list[str]) -> str:
    """What would run jobs, by command line and profile: ``slurm``, ``local``, …"""
    for option, value in zip(words, [*words[1:], ""], strict=True):
        if option in ("--executor", "-e"):
            return value
        if option.startswith("--executor="):
            return option.partition("=")[2]
    file = Path(parse(words).profile or "", "config.yaml")
    return str(read_yaml(str(file)).get("executor", "local")) if file.is_file() else "local"


def check(words: list[str]) -> int:
    """Say what is wrong with a command line, in a few lines; returns the exit code, 0 where nothing is."""
    line = parse(words)
    try:
        _check_configfiles(line)
        _check_profile(line)
    except BadInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _check_configfiles(line: CommandLine) -> None:
    for name in line.configfiles:
        if Path(name).is_file():
            read_yaml(name)
        elif name in set(rules()):
            rest = [word for word in line.words if word != name]
            raise BadInputError(
                f"`{name}` stands behind --configfile, which takes every word that follows it for a file",
                f"put the target first: {shlex.join(['snakemake', name, *rest])}",
            )
        else:
            raise BadInputError(f"configuration {name} does not exist{_near(Path(name))}", "correct the path")
    if Path("config/config.yaml").is_file():
        read_yaml("config/config.yaml")


def _check_profile(line: CommandLine) -> None:
    if line.profile and "/" in line.profile and not Path(line.profile).is_dir():
        folder = Path(line.profile)
        raise BadInputError(f"profile {folder} does not exist{_near(folder)}", f"give {PROFILES}")
    if line.profile and Path(line.profile, "config.yaml").is_file():
        read_yaml(f"{line.profile}/config.yaml")
    if line.profile or os.environ.get("SNAKEMAKE_PROFILE") or line.looks:
        return
    if not line.has_cores:
        raise BadInputError("no profile is given: nothing says where the stages run", f"add {PROFILES}")
    print(
        "warning: no profile is given: every stage runs here, with one node and Snakemake's own defaults; "
        f"give {PROFILES}",
        file=sys.stderr,
    )


def read_yaml(name: str) -> dict[str, Any]:
    """The mapping that a YAML (or JSON) file holds.

    Raises:
        BadInputError: it is not valid, with line and column, or holds no mapping.
    """
    text = _text(name)
    try:
        content = strict_yaml.load(text)
    except strict_yaml.Refused as refused:
        place = f", line {refused.mark.line + 1}, column {refused.mark.column + 1}" if refused.mark else ""
        raise BadInputError(f"{name}{place}: {refused.problem}", refused.fix) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}, line {mark.line + 1}, column {mark.column + 1}" if mark else name
        shown = text.splitlines()[mark.line].rstrip() if mark and mark.line < len(text.splitlines()) else ""
        start = error.context_mark
        since = f" ({error.context}, from line {start.line + 1})" if start and error.context else ""
        raise BadInputError(
            f"{place}: {error.problem}{since}" + (f"\n    {shown}" if shown else ""), _yaml_fix(text, shown, error)
        ) from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        place = re.search(r"position (\d+)", str(error))
        line = text[: int(place[1])].count("\n") + 1 if place else 1
        raise BadInputError(f"{name}, line {line}: {str(error).splitlines()[0]}", "remove that character") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise BadInputError(
            f"{name} holds no keys: it is {type(content).__name__}", "write `key: value` lines, config/README.md"
        )
    return content


def _text(name: str) -> str:
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        raise BadInputError(f"{name} cannot be read: {error.strerror}", "correct the path or its permissions") from None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        wide = content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:4]
        line = content[: error.start].count(b"\n") + 1
        problem = "it is UTF-16 or UTF-32" if wide else f"line {line} holds bytes of another encoding"
        fix = f"iconv -f {'UTF-16' if wide else 'LATIN1'} -t UTF-8 {shlex.quote(name)} > utf8.yaml, or save it as UTF-8"
        raise BadInputError(f"{name} is not UTF-8: {problem}", fix) from None


def _yaml_fix(text: str, shown: str, error: yaml.MarkedYAMLError) -> str:
    if "\t" in shown:
        return "use spaces, not tabs"
    if "expected ',' or" in str(error.problem):
        return "close the bracket that was opened before"
    if "mapping values are not allowed" in str(error.problem):
        return "indent keys of one section alike, and quote a text that holds `: `"
    return "correct that line or the one before: a space after each colon, keys of one section indented alike"


def rules() -> Iterator[str]:
    """Names of the workflow's rules, read from the files of the current folder without running them."""
    for path in [Path("Snakefile"), *sorted(Path("workflow/rules").glob("*.smk"))]:
        if path.is_file():
            yield from re.findall(r"^rule (\w+):", path.read_text(encoding="utf-8"), re.MULTILINE)


def _near(path: Path) -> str:
    """A hint at an entry of the same folder with a similar name."""
    if not path.parent.is_dir():
        return f" (nor does its folder {path.parent})"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
