"""Every program that writes, on a full and on a read-only file system; run in a mount namespace of its own.

    unshare --mount [--map-root-user] python full_disks.py FOLDER

Prints one JSON object: "<program> <kind>" → exit code and what it said.
"""

import contextlib
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
SCRIPTS = PROJECT / "workflow/scripts"
sys.path[:0] = [str(PROJECT / "tests"), str(PROJECT / "workflow"), str(SCRIPTS)]

import stored_checkpoint as stored  # noqa: E402

DEMO = PROJECT / "resources/demo/chats.jsonl"


def programs(made: Path, disk: Path) -> dict[str, list[str]]:
    """Program → arguments that write below ``disk`` from inputs below ``made``."""
    base, step = made / "base", stored.STORED / f"step_{stored.STEP}"
    return {
        "prepare_data": f"--source {DEMO} --output {disk}/a.jsonl --rejects {disk}/b.jsonl --receipt {disk}/c.json",
        "tokenize_data": f"--input {made}/train.jsonl --tokenizer {base} --template deepseek-r1 --output {disk}/tokens "
        f"--rejects {disk}/d.jsonl --statistics {disk}/s.json --receipt {disk}/t.json --max-length 512",
        "prepare_model": f"--tiny --hidden-size 32 --layers 2 --output {disk}/base --receipt {disk}/p.json",
        "plan": f"--model deepseek-r1 --samples 1000 --mean-length 100 --longest-row 1000 --output {disk}/plan "
        f"""--receipt {disk}/plan.json --resources {{"nodes":9,"gres":"gpu:h100:8","mem_mb":1900000}}""",
        "convert_checkpoint": f"--checkpoint {step} --base {base} --output {disk}/model --receipt {disk}/m.json",
        "build_report": f"{made}/results --output {disk}/report.html",
        "adopt": f"{disk}/copy",
    }


def run(program: str, line: str) -> dict:
    said = io.StringIO()
    arguments = sys.argv
    sys.argv = [f"{program}.py", *line.split()]
    code: object = 0
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(SCRIPTS / f"{program}.py"), run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = arguments
    return {"code": code, "said": said.getvalue()}


def mount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)


def lay_out(made: Path, disk: Path) -> None:
    """What adopt works on."""
    for folder in (disk / "copy/receipts", disk / "copy/model"):
        folder.mkdir(parents=True)
    receipt = {"schema": 1, "rule": "verify_model", "inputs": {}, "settings": {}, "figures": {"x": "y" * 70_000}}
    text = json.dumps(receipt | {"result": {"model": str(made / "first/model")}})
    (disk / "copy/receipts/verify_model.json").write_text(text)


def main(folder: Path) -> None:
    made, disk = folder / "made", folder / "disk"
    disk.mkdir()
    made.mkdir()
    stored.write_inputs(made)
    (made / "results/receipts").mkdir(parents=True)
    outputs = (
        f"--output {made}/train.jsonl --rejects {made}/r.jsonl --receipt {made}/results/receipts/prepare_data.json"
    )
    assert run("prepare_data", f"--source {DEMO} {outputs}")["code"] == 0
    found = {}
    for kind in ("full", "read-only"):
        for program, line in programs(made, disk).items():
            mount(disk, "size=96k")
            lay_out(made, disk)
            if kind == "full":
                with open(disk / "ballast", "wb", buffering=0) as stream, contextlib.suppress(OSError):
                    while stream.write(bytes(4096)):
                        pass
            else:
                subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            found[f"{program} {kind}"] = run(program, line)
            subprocess.run(["umount", str(disk)], check=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
