"""torchrun, and a record of how the ranks of its node ended: one that is killed cannot leave word itself."""

import json
import signal
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .. import files

GRACE = 30  # seconds between torchrun's SIGTERM to the other ranks and its SIGKILL (elastic/multiprocessing/api.py)


def main() -> None:
    """Run torchrun with all arguments but the first, which names the file for the exit codes of ranks that failed."""
    try:
        run.main(sys.argv[2:])
    except ChildFailedError as error:
        files.write_text(Path(sys.argv[1]), json.dumps(exit_codes(error)))
        raise


def exit_codes(error: ChildFailedError) -> dict[int, int]:
    """Exit code of each rank as subprocess gives it: ``-9`` if killed, ``-15`` if stopped after another's failure.

    A rank that outlives torchrun's SIGTERM is killed by it as well; that one was stopped, too.
    """
    _, first = error.get_first_failure()
    codes = {}
    for rank, failure in error.failures.items():
        late = failure.timestamp >= first.timestamp + GRACE - 1  # whole seconds
        killed = failure.exitcode == -signal.SIGKILL
        codes[rank] = -signal.SIGTERM if killed and late else failure.exitcode
    return codes


if __name__ == "__main__":
    main()
