"""What every command-line program of the workflow shares: exit codes, messages, help layout."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from . import environment_faults, interpreter, json_files
from .errors import BadInputError, CrashError, StageError
from .printable import visible


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser that shows a script's docstring as written and every default."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    return argparse.ArgumentParser(description=description, formatter_class=Formatter)


def json_object(option: str, text: str) -> dict[str, Any]:
    """The JSON object that the option's text is.

    Raises:
        BadInputError: it is none.
    """
    try:
        return json_files.parse(text)
    except json_files.NotJsonError as error:
        raise BadInputError(f"{option} is not the JSON object that it has to be: {error}") from None


def say(message: str) -> None:
    """Print a progress line to standard error, flushed, since logs are read meanwhile; control characters are shown.

    A log that cannot be written (its disk is full) does not end the stage; what is done goes to another place, or has
    words of its own.
    """
    with contextlib.suppress(OSError):
        print(visible(message), file=sys.stderr, flush=True)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's ``main`` and leave with the exit code of the contract.

    Known errors print one message, and so do faults of the machine and its disks; an unknown one keeps its traceback
    (it is our bug) and exits 5.
    A pipe closed by the reader (``script | head``) is not an error.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except StageError as error:
        say(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        say("interrupted: nothing half-written is kept under a final name; run the same command to go on")
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__):
            traceback.print_exc()
        say(f"error: {interpreter.advice(f'has no {error.name}')}")
        code = BadInputError.exit_code
    except Exception as error:
        if fault := environment_faults.explain(error):
            say(f"error: {fault}")
            sys.exit(fault.exit_code)
        with contextlib.suppress(OSError):
            traceback.print_exc()
        say("error: unexpected failure, this is a defect of the workflow; please report the lines above")
        code = CrashError.exit_code
    sys.exit(code)
