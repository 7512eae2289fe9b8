"""Conversion against its bars, as ratios. Each part says whether its bars are met (exit code 1 if not).

    python benchmarks/convert.py memory              peak memory at 1, 4 and 8 GB of FP32 weights; bytes moved
    python benchmarks/convert.py copy                rate against a plain sequential copy of the same bytes, cold caches
    python benchmarks/convert.py limit               the largest of them inside a memory control group of 512 MiB
    python benchmarks/convert.py peers --ranks 4 8   against DeepSpeed's zero_to_fp32.py and xtuner's pth_to_hf, on
                                                     checkpoints that DeepSpeed writes here (train environment)

Everything lies under --folder, on the disk to be measured, and is removed at the end.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT / "workflow"), str(PROJECT / "tests")]

import large_zero3  # noqa: E402

from deepseek_sft.convert import tiny_model, zero  # noqa: E402
from deepseek_sft.families import deepseek_v3  # noqa: E402
from deepseek_sft.tensors import memory_bound  # noqa: E402

MEMORY_BAR = 256 << 20  # plus twice the work item (16 MiB of FP32) of every thread
COPY_BAR, PEER_BAR, BYTES_BAR = 0.8, 4.0, 1.02
LIMIT = 512 << 20
SCRIPT = PROJECT / "workflow/scripts/convert_checkpoint.py"
TRAIN = PROJECT / ".envs/train"
BLOCK = 16 << 20

# Runs the program given and prints its peak of resident memory, and what /proc/self/io counted, as JSON.
PROBE = """
import atexit, json, resource, runpy, sys
def report():
    lines = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "read": int(lines["rchar"]), "written": int(lines["wchar"]),
                      "disk": int(lines["read_bytes"])}))
atexit.register(report)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# pth_to_hf asks torch's device for something that its CPU module lacks.
PTH_TO_HF = """
import runpy, torch
torch.cpu.is_bf16_supported = lambda: True
runpy.run_module("xtuner.tools.model_converters.pth_to_hf", run_name="__main__", alter_sys=True)
"""
XTUNER_CONFIG = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from xtuner.model import SupervisedFinetune
base = {base!r}
tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=base)
llm = dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=base)
model = dict(type=SupervisedFinetune, llm=llm)
"""


@dataclass(frozen=True)
class Run:
    """A measured run: seconds, and what ``PROBE`` or ``wait4`` saw, in bytes."""

    seconds: float
    peak: int
    read: int = 0
    written: int = 0
    disk: int = 0  # read from the disk, the kernel's read-ahead included


def shape_of(gigabytes: float, experts: int = 16) -> tiny_model.TinyShape:
    """The smallest model of at least so many bytes of FP32 weights: layers of 2048 and ``experts`` experts."""
    for layers in itertools.count(2):
        shape = tiny_model.TinyShape(
            hidden_size=2048, layers=layers, heads=16, routed_experts=experts, moe_intermediate_size=704,
            intermediate_size=5632, vocab_size=16000,
        )  # fmt: skip
        specs = deepseek_v3.tensor_specs(tiny_model.config_of(shape))
        if 4 * sum(spec.elements for spec in specs.values()) >= gigabytes * 1e9:
            break
    return shape


def synthetic(folder: Path, gigabytes: float) -> int:
    """Base and checkpoint of 8 ranks; bytes of its FP32 weights."""
    specs = large_zero3.write_base(folder / "base", shape_of(gigabytes))
    return large_zero3.write_checkpoint(folder / "step", specs, world_size=8, sub_group_size=10**8)


def forget(*folders: Path) -> None:
    """Drop these folders' files from the page cache."""
    os.sync()
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def peer(command: list[object], folder: Path) -> Run:
    """Seconds and peak resident memory of a command."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} failed:\n{output.decode()[-3000:]}")
    return Run(time.perf_counter() - started, usage.ru_maxrss * 1024)


def ours(checkpoint: Path, base: Path, output: Path, *options: str, before: str = "") -> Run:
    """One conversion, cold; ``before`` is shell text, for instance to enter a control group."""
    shutil.rmtree(output, ignore_errors=True)
    forget(checkpoint, base)
    arguments = [f"--checkpoint={checkpoint}", f"--base={base}", f"--output={output}"]
    command = [sys.executable, "-c", PROBE, str(SCRIPT), *arguments, f"--receipt={output}.json", *options]
    if before:
        command = ["bash", "-c", before + 'exec "$@"', "bash", *command]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"conversion failed:\n{done.stderr[-3000:]}")
    return Run(seconds, **json.loads(done.stdout.splitlines()[-1]))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def workers() -> int:
    return memory_bound.plan_buffers("auto", 0, 8, memory_bound.measure()).workers


def peak_bar() -> int:
    return MEMORY_BAR + 2 * BLOCK * workers()


def memory_part(folder: Path, sizes: list[float]) -> bool:
    met = True
    for size in sizes:
        place = folder / f"{size:g}"
        fp32 = synthetic(place, size)
        run = ours(place / "step", place / "base", place / "model")
        read, written = run.read / fp32, run.written / size_of(place / "model")
        print(
            f"memory    {fp32 / 1e9:.2f} GB of FP32: peak {run.peak / 2**20:.0f} MiB (bar {peak_bar() / 2**20:.0f}); "
            f"read {read:.3f} × ({run.disk / fp32:.3f} × from disk), wrote {written:.3f} × "
            f"(bar {BYTES_BAR}); {run.seconds:.1f} s",
            flush=True,
        )
        met &= run.peak <= peak_bar() and max(read, written) <= BYTES_BAR
        shutil.rmtree(place)
    return met


def plain_copy(checkpoint: Path, output: Path) -> float:
    """Seconds to read the FP32 weights from end to end and write half as many bytes, synced."""
    ranges: dict[Path, list[list[int]]] = {}
    for parameter in zero.open_checkpoint(checkpoint).parameters.values():
        for path, offset, length in parameter.pieces(0, parameter.elements):
            places = ranges.setdefault(path, [])
            if places and places[-1][1] == offset:
                places[-1][1] += 4 * length
            else:
                places.append([offset, offset + 4 * length])
    forget(checkpoint)
    buffer = memoryview(bytearray(BLOCK))
    started = time.perf_counter()
    with open(output, "wb", buffering=0) as target:
        for path, places in ranges.items():
            with open(path, "rb", buffering=0) as source:
                for start, end in places:
                    source.seek(start)
                    while start < end:
                        count = source.readinto(buffer[: min(BLOCK, end - start)])
                        target.write(buffer[: count // 2])
                        start += count
        os.fsync(target.fileno())
    seconds = time.perf_counter() - started
    output.unlink()
    return seconds


def copy_part(folder: Path, size: float, rounds: int) -> bool:
    fp32 = synthetic(folder, size)
    pairs = []
    for _ in range(rounds):  # in turn, so that both meet the same machine
        copied = plain_copy(folder / "step", folder / "copy")
        pairs.append((copied, ours(folder / "step", folder / "base", folder / "model").seconds))
        print(f"round     copy {pairs[-1][0]:.1f} s, conversion {pairs[-1][1]:.1f} s", flush=True)
    copied, converted = (statistics.median(values) for values in zip(*pairs, strict=True))
    print(
        f"copy      {fp32 / 1e9:.2f} GB of FP32, median of {rounds}: plain copy {fp32 / copied / 1e6:.0f} MB/s, "
        f"conversion {fp32 / converted / 1e6:.0f} MB/s, its start included; "
        f"ratio {copied / converted:.2f} (bar {COPY_BAR})"
    )
    return copied / converted >= COPY_BAR


def limit_part(folder: Path, size: float) -> bool:
    """The conversion in a new memory group (version 1 or 2) below this process's own."""
    group, limit = _own_group()
    place = group / f"convert-benchmark-{os.getpid()}" if group else None
    try:
        if place is None:
            raise OSError("no memory control group is mounted")
        place.mkdir()
        (place / limit).write_text(str(LIMIT))
    except OSError as error:
        print(f"limit     skipped: a memory control group cannot be set here ({error})")
        if place and place.is_dir():
            place.rmdir()
        return True
    try:
        fp32 = synthetic(folder, size)
        run = ours(folder / "step", folder / "base", folder / "model", before=f"echo $$ > {place}/cgroup.procs; ")
    finally:
        place.rmdir()
    print(
        f"limit     {fp32 / 1e9:.2f} GB of FP32 in a group of 512 MiB: "
        f"peak {run.peak / 2**20:.0f} MiB, {run.seconds:.1f} s"
    )
    return True


def _own_group() -> tuple[Path | None, str]:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/"), "memory.limit_in_bytes"
    group = Path("/sys/fs/cgroup") / path.lstrip("/")
    return (group, "memory.max") if (group / "memory.current").exists() else (None, "")


def peers_part(folder: Path, ranks: list[int], size: float) -> bool:
    python, met = TRAIN / "bin/python", True
    library = next((TRAIN / "lib").glob("python3*/site-packages"))
    shutil.copy(
        library / "deepspeed/utils/zero_to_fp32.py", folder
    )  # beside DeepSpeed's own types.py it does not start
    base = folder / "base"
    specs = large_zero3.write_base(base, shape_of(size, experts=4))
    (folder / "config.py").write_text(XTUNER_CONFIG.format(base=str(base)))
    fp32 = 4 * sum(math.prod(spec.shape) for spec in specs.values())
    for count in ranks:
        checkpoint = folder / f"run{count}/iter_1.pth"
        launcher = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        peer([*launcher, PROJECT / "benchmarks/deepspeed_checkpoint.py", base, checkpoint], folder)
        own = [ours(checkpoint, base, folder / "model")]
        tools: dict[str, list[object]] = {
            "zero_to_fp32": [
                "zero_to_fp32.py",
                checkpoint.parent,
                "fp32",
                "-t",
                checkpoint.name,
                "--safe_serialization",
            ],
            "pth_to_hf": ["-c", PTH_TO_HF, "config.py", checkpoint, "hf", "--safe-serialization"],
        }
        others = {}
        for name, words in tools.items():  # in turn with ours, so that both meet the same disk
            forget(checkpoint, base)
            others[name] = peer([python, *words], folder)
            own += [ours(checkpoint, base, folder / "model") for _ in range(2)]
            for output in ("fp32", "hf"):
                shutil.rmtree(folder / output, ignore_errors=True)
        found = sorted(own, key=lambda run: run.seconds)[len(own) // 2]
        shortest, longest = min(run.seconds for run in own), max(run.seconds for run in own)
        print(
            f"ours      {count} ranks, {fp32 / 1e9:.2f} GB: median of {len(own)} {found.seconds:.1f} s "
            f"({shortest:.1f} to {longest:.1f}), peak {found.peak / 2**20:.0f} MiB"
        )
        for name, run in others.items():
            ratio = run.seconds / found.seconds
            print(
                f"{name:9} {run.seconds:.1f} s, {ratio:.1f} × ours (bar {PEER_BAR}); peak {run.peak / 2**20:.0f} MiB, "
                f"{run.peak / found.peak:.1f} × ours",
                flush=True,
            )
            met &= ratio >= PEER_BAR
        shutil.rmtree(checkpoint.parent)
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["memory", "copy", "limit", "peers"])
    parser.add_argument("--folder", type=Path, default=Path(), help="where the files go (the current folder)")
    parser.add_argument(
        "--sizes", type=float, nargs="+", metavar="GB", help="FP32 weights (1 4 8; 8 for copy and limit)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of copy")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8], help="of peers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="convert-benchmark-") as name:
        folder, sizes = Path(name).resolve(), arguments.sizes
        met = {
            "memory": lambda: memory_part(folder, sizes or [1, 4, 8]),
            "copy": lambda: copy_part(folder, (sizes or [8])[0], arguments.rounds),
            "limit": lambda: limit_part(folder, (sizes or [8])[0]),
            "peers": lambda: peers_part(folder, arguments.ranks, (sizes or [1])[0]),
        }[arguments.part]()
    print("all bars are met" if met else "a bar is not met")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
