"""Take out, one at a time, what docs/reliability.md relies on, in a copy of the checkout: its test must fail then.

    without_mechanisms.py FOLDER

Exit code 1 where a test passes without its mechanism, or where the mechanism is not found any more.
"""

import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
LIBRARY = "workflow/deepseek_sft"
UNIT = "tests/unit"
# Drill → file, text, what stands in its place, test.
MECHANISMS = {
    "checksums of what resuming reads": (
        f"{LIBRARY}/checkpoint/rank_state.py",
        "if error := checksums.error_of(verdict.damaged):",
        "if error := None:",
        f"{UNIT}/test_checkpoint_resume.py",
    ),
    "restricted unpickler": (
        f"{LIBRARY}/checkpoint/torch_pickle.py",
        'raise UnknownNameError(f"it asks for {module}.{name}, which no checkpoint needs")',
        "return super().find_class(module, name)",
        f"{UNIT}/test_checkpoint_gadgets.py",
    ),
    "judging of the marker": (
        f"{LIBRARY}/training/checkpoints.py",
        "if reason := _malformed(marker):",
        "if reason := None:",
        f"{UNIT}/test_checkpoint_resume.py",
    ),
    "sums of token shards": (
        f"{LIBRARY}/data/tokens.py",
        "if found != expected:",
        "if False:",
        f"{UNIT}/test_data_token_sums.py",
    ),
    "sums of the base": (
        f"{LIBRARY}/checkpoint/base_sums.py",
        'elif digest != sums[name]["sha256"]:',
        "elif False:",
        f"{UNIT}/test_base_sums.py",
    ),
    "faults of disks in words": (
        f"{LIBRARY}/cli.py",
        "if fault := environment_faults.explain(error):",
        "if fault := None:",
        f"{UNIT}/test_environment_faults.py",
    ),
    "removal of leftovers": (
        f"{LIBRARY}/files.py",
        "leftovers.sweep([folder])",
        "pass",
        f"{UNIT}/test_environment_faults.py",
    ),
    "keys that stand twice": (
        f"{LIBRARY}/json_files.py",
        "if len(value) != len(pairs):",
        "if False:",
        f"{UNIT}/test_json_files.py",
    ),
    "types in receipts": (
        f"{LIBRARY}/receipts.py",
        "        check(receipt)\n",
        "",
        f"{UNIT}/test_json_files.py",
    ),
    "recognition of copies": (
        f"{LIBRARY}/adoption.py",
        "if found := foreign(results):",
        "if found := None:",
        f"{UNIT}/test_adoption.py",
    ),
    "a log that cannot be written": (
        "workflow/scripts/stage.sh",
        "exit 2\nfi\necho",
        "fi\necho",
        f"{UNIT}/test_environment_faults.py",
    ),
}


def copy(folder: Path) -> Path:
    target = folder / "checkout"
    shutil.rmtree(target, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, target / name)
    (target / ".envs").symlink_to(PROJECT / ".envs")
    return target


def main(folder: Path) -> int:
    checkout, wrong = copy(folder), 0
    for name, (file, text, instead, test) in MECHANISMS.items():
        path = checkout / file
        whole = path.read_text()
        if text not in whole:
            print(f"NOT FOUND  {name}: {file} has no {text!r}", flush=True)
            wrong += 1
            continue
        path.write_text(whole.replace(text, instead))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
        path.write_text(whole)
        said = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
        passes = done.returncode != 1 or not said
        wrong += passes
        print(
            f"{'PASSES WITHOUT' if passes else 'fails without'}  {name}: {said.partition('::')[2] or test}", flush=True
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
