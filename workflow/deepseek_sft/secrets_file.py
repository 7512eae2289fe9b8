"""Environment variables that nobody else may read: they come from a file of mode 0600, and stand nowhere else.

What stands in the configuration is copied into results, scripts and receipts, and is passed on command lines, which
every user of a node sees. So a value that looks like a secret is refused there (``reason``); the file is read on the
node, by the process that starts the stage's programs, and its values go into their environment alone.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import BadInputError

VARIABLE = "DEEPSEEK_SFT_SECRETS_FILE"  # its path, for the programs of training
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TELLING = re.compile(
    r"(^|_)(api_?keys?|(access|secret|private|account|auth|encryption)_?keys?|keys?|(auth|access|bearer|id|refresh)?_?token"
    r"|secrets?|password|passwd|passphrase|pwd|credentials?)$"
)
_ELSEWHERE = re.compile(r"_(file|files|path|dir|folder|name|id|index|type|length|size)$")
_HARMLESS = {"", "0", "1", "true", "false", "none", "null"}
_LOOKS = {
    "an address with a password": re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@]*:?[^/\s@]*@", re.IGNORECASE),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a token": re.compile(
        r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
        r"|AKIA[0-9A-Z]{16}|xox[abps]-[\w-]{10,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+|[Bb]earer\s+\S{8,})"
    ),
}
_ASSIGNED = re.compile(r"\b([A-Za-z_][A-Za-z0-9_]*)=(\"[^\"]*\"|'[^']*'|[^\s;&|]*)")

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s@]*@", re.IGNORECASE)
_NAMED = r"[A-Za-z_][A-Za-z0-9_-]*"
_SAID = (  # NAME="value" and "name": "value"; NAME=value; name: value; --name value
    re.compile(rf"(\b({_NAMED})(?:\s*=|[\"']\s*:)\s*[\"'])([^\"']+)"),
    re.compile(rf"(\b({_NAMED})\s*=\s*)([^\s\"',;&}}]+)"),
    re.compile(rf"(\b({_NAMED}):\s+)(?!\S*:\s)([^\s\"',;&}}]+)"),
    re.compile(rf"(--({_NAMED})\s+[\"']?)([^\s\"',;&}}]+)"),
)
_PLAIN = re.compile(r"[\d.,:]+|[$<-].*|(key|keys|token)")  # values, and names before a colon, that are no secrets
HIDDEN = "(hidden)"


def reason(name: str, value: Any) -> str:
    """Why a variable looks like a secret; empty where it does not."""
    text = str(value).strip()
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if _TELLING.search(plain) and not _ELSEWHERE.search(plain) and text.lower() not in _HARMLESS:
        return "by its name it holds a secret"
    return next((f"its value looks like {what}" for what, pattern in _LOOKS.items() if pattern.search(text)), "")


def masked(line: str) -> str:
    """A line of a log with what looks like a secret hidden: tokens, passwords in addresses, values of telling names.

    A page or a screen is passed around. What looks like nothing is shown: a log is no place for a secret.
    """
    if "://" in line and "@" in line:
        line = _ADDRESS.sub(rf"\1{HIDDEN}@", line)
    line = _LOOKS["a token"].sub(HIDDEN, line)

    def assigned(found: re.Match[str]) -> str:
        start, name, value = found.groups()
        plain = _PLAIN.fullmatch(value) or HIDDEN in value or (start == f"{name}: " and _PLAIN.fullmatch(name))
        return found[0] if plain or not reason(name, value) else f"{start}{HIDDEN}"

    for pattern in _SAID:
        line = pattern.sub(assigned, line)
    return line


def problems(config: dict[str, Any]) -> Iterator[str]:
    """Variables, flags and shell lines of a configuration that must not hold what they do; never with their values."""
    advice = (
        "would stand in results, scripts and command lines for all to read; write NAME=VALUE into a file of mode 0600"
    )
    for section in ("train", "serve"):
        given = config[section]
        for name, value in given["environment"].items():
            if not NAME.fullmatch(name):
                yield f"{section}.environment: {name!r} is no name of a variable: letters, digits and _ alone"
            elif why := reason(name, value):
                yield f"{section}.environment.{name}: {why}, and {advice} and set {section}.secrets_file"
    for name, value in config["serve"]["engine_args"].items():
        if isinstance(value, str) and (why := reason(name, value)):
            yield f"serve.engine_args.{name}: {why}, and {advice} and set serve.secrets_file"
    for stage, own in config["envs"].items():
        for name, value in _ASSIGNED.findall(str((own or {}).get("activate") or "") if isinstance(own, dict) else ""):
            taken = value.strip("\"'")
            if not taken.startswith("$") and (why := reason(name, taken)):
                yield f"envs.{stage}.activate: {name}: {why}, and {advice}, train.secrets_file or serve.secrets_file"


def check(path: Path) -> None:
    """Look at a secrets file without reading it.

    Raises:
        BadInputError: it is no file, belongs to somebody else, or can be read by others.
    """
    try:
        found = path.stat()
    except OSError as error:
        fix = f"(umask 077; cat > {path}), one NAME=VALUE a line"
        raise BadInputError(f"the secrets file {path} cannot be read: {error.strerror}", fix) from None
    if not stat.S_ISREG(found.st_mode):
        raise BadInputError(f"the secrets file {path} is no file", "name a file with one NAME=VALUE a line")
    if found.st_uid != os.geteuid():
        raise BadInputError(
            f"the secrets file {path} belongs to user {found.st_uid}, not to you ({os.geteuid()})",
            "make one of your own",
        )
    if found.st_mode & 0o077:
        raise BadInputError(
            f"the secrets file {path} can be read by other users (mode {stat.S_IMODE(found.st_mode):04o})",
            f"chmod 600 {path}, and change what it holds",
        )


def read(path: Path) -> dict[str, str]:
    """Variables of a secrets file: ``NAME=VALUE`` a line; ``#`` comments, ``export`` and quotation marks are allowed.

    Raises:
        BadInputError: as ``check``; or a line that says no variable, by its number, never by what it says.
    """
    check(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BadInputError(f"the secrets file {path} cannot be read: {why}", "write one NAME=VALUE a line") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip().removeprefix("export ").strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not NAME.fullmatch(name) or "\0" in value:
            raise BadInputError(f"the secrets file {path}, line {number}: it is not NAME=VALUE", "correct that line")
        if name in found:
            raise BadInputError(
                f"the secrets file {path}, line {number}: {name} stands there twice", "keep one of them"
            )
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
        found[name] = value[1:-1] if quoted else value
    return found
