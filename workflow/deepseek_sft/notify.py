"""The user's command on events of a run: it is started and left alone, so that nothing it does can hurt the run.

``timeout`` of the coreutils ends it after a minute, with all that it has started. What it prints goes to
``logs/<experiment>/notify.log``. What is told stands in its environment:

    DEEPSEEK_SFT_EVENT       started, finished, failed or stopped
    DEEPSEEK_SFT_EXPERIMENT  its name
    DEEPSEEK_SFT_RESULTS     its folder, absolute
    DEEPSEEK_SFT_HOST        where Snakemake runs
    DEEPSEEK_SFT_RULE        of failed and stopped: the stage, where one failed
    DEEPSEEK_SFT_EXIT_CODE   likewise, where it is known
    DEEPSEEK_SFT_LOG         likewise, its log, absolute
    DEEPSEEK_SFT_MESSAGE     of finished, failed and stopped: the last lines of the run, as the terminal shows them
"""

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from . import ending
from .cli import say

Event = Literal["started", "finished", "failed", "stopped"]
SECONDS, GRACE = 60, 5  # until it is asked to end, and until it is killed
LOG = "notify.log"
PREFIX = "DEEPSEEK_SFT_"
STOPPED = "4"  # exit code of training that was asked to save and end
LONGEST = 8192  # characters of a variable: Linux takes no more than 128 KiB, and messages are read by people


def tell(command: str | None, event: Event, results: Path, logs: Path, **told: str) -> None:
    """Start the command, if there is one, and return at once; what keeps it from starting is said and no more.

    Args:
        results, logs: folders of the experiment.
        told: further variables, by their names in lower case without the prefix.
    """
    if not command:
        return
    known = {
        "event": event,
        "experiment": results.name,
        "results": str(results.absolute()),
        "host": socket.gethostname(),
    }
    values = {PREFIX + name.upper(): text[:LONGEST].replace("\0", "") for name, text in (known | told).items() if text}
    # Of an earlier event nothing may be left over, where a notification starts a run.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    try:
        logs.mkdir(parents=True, exist_ok=True)
        with open(logs / LOG, "ab") as log:
            subprocess.Popen(
                ["timeout", f"--kill-after={GRACE}", str(SECONDS), "bash", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=inherited | values,
                start_new_session=True,  # Ctrl-C and the end of the terminal are not for it
            )
    except OSError as error:
        say(f"warning: notify: the command for {event} could not be started: {error}")


def of_failure(failures: Sequence[ending.Failure], interrupted: bool) -> tuple[Event, dict[str, str]]:
    """Which event the end of a run is that did not finish, and what is told of it."""
    if interrupted or not failures:
        return ("stopped" if interrupted else "failed"), {}
    first = failures[0]
    code = ending.cause_of(first).code
    told = {"rule": first.rule, "exit_code": code, "log": str(first.log.absolute()) if first.log else ""}
    return ("stopped" if code == STOPPED else "failed"), told
