"""Rounds in which 8 processes take over the lock of a dead one at the same moment: never two owners, never none.

lock_rounds.py FOLDER ROUNDS    prints the figures as JSON; exit code 1 if a promise was broken
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "workflow"))
from deepseek_sft.cluster_jobs import holders
from deepseek_sft.errors import BadInputError
from deepseek_sft.training import lock

TAKERS = 8


def take(folder: Path, rounds: int, barrier, owned, doubled) -> None:
    for number in range(rounds):
        run = folder / str(number)
        barrier.wait()
        try:
            with lock.hold(run):
                try:
                    os.close(os.open(run / "owner", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    with doubled.get_lock():
                        doubled.value += 1
                owned[number] = 1
                time.sleep(0.001)
                (run / "owner").unlink(missing_ok=True)
        except BadInputError:
            pass  # somebody was faster
        barrier.wait()


def main() -> int:
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    os.environ.pop("SLURM_JOB_ID", None)
    dead = holders.own() | {"pid": 2**22 + 1, "started": "1"}
    for number in range(rounds):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / lock.NAME).write_text(json.dumps(dead))
    barrier, doubled = multiprocessing.Barrier(TAKERS), multiprocessing.Value("i", 0)
    owned = multiprocessing.Array("i", rounds)
    begin = time.monotonic()
    takers = [
        multiprocessing.Process(target=take, args=(folder, rounds, barrier, owned, doubled)) for _ in range(TAKERS)
    ]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    codes = [taker.exitcode for taker in takers]
    left = sum(1 for _ in folder.glob("*/*"))
    figures = {"rounds": rounds, "two_owners": doubled.value, "no_owner": rounds - sum(owned), "left_files": left}
    print(json.dumps(figures | {"exit_codes": codes, "seconds": round(time.monotonic() - begin, 1)}))
    return int(doubled.value > 0 or sum(owned) < rounds or any(codes) or left > 0)


if __name__ == "__main__":
    sys.exit(main())
