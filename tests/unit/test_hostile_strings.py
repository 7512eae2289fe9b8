"""No text of a configuration is taken for anything but text by a shell: not in commands, not in sbatch scripts."""

import copy
import functools
import itertools
import json
import os
import random
import re
import shlex
import subprocess
import typing
from pathlib import Path

import pytest
import yaml

from deepseek_sft import config
from deepseek_sft.errors import BadInputError
from deepseek_sft.experiment import Experiment
from deepseek_sft.settings import field_types
from deepseek_sft.settings.configuration import Configuration
from deepseek_sft.slurm import sbatch

PROJECT = Path(__file__).resolve().parents[2]
CASES = int(os.environ.get("HOSTILE_CASES", "200"))
TOUCH = "touch canary"
ATTACKS = [
    f"$({TOUCH})", f"`{TOUCH}`", f"; {TOUCH};", f"& {TOUCH} &", f"| {TOUCH}", f"\n{TOUCH}\n", f"' ; {TOUCH} ; '",
    f'" ; {TOUCH} ; "', f"'\"$({TOUCH})\"'", f"${{x:-$({TOUCH})}}", f"$((a[$({TOUCH})]))", f"<({TOUCH})",
    f">{'canary'}", f"x && {TOUCH}", f"x || {TOUCH}", f"\\'$({TOUCH})", f"x\r\n{TOUCH}", f"#\n{TOUCH}",
    f"%s$({TOUCH})", f"{{{{x}}}}$({TOUCH})", f"-x $({TOUCH})", f"~/$({TOUCH})", f"a b'c\"d$({TOUCH})", f"é💣`{TOUCH}`",
    f"!{TOUCH}", f"*;{TOUCH}", f"EOF\n{TOUCH}\nEOF", f"a\\\n{TOUCH}", f"$'\\n{TOUCH}\\n'", f"{TOUCH}",
    f"{{a,$({TOUCH})}}", f"[[ -v a[$({TOUCH})] ]]", "a'b", 'a"b', "a\\", "a\tb",
]  # fmt: skip


def base() -> dict:
    return copy.deepcopy(demo())


@functools.cache
def demo() -> dict:
    found = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    return config.merge(found, yaml.safe_load((PROJECT / "config/experiments/demo.yaml").read_text()))


def places(kind: type = Configuration, path: tuple = ()) -> list[tuple]:
    """Paths of all keys that may hold text; of a mapping's own keys a name and a value, of a list an entry."""
    found = []
    for name, key in field_types.keys(kind).items():
        kinds = [typing.get_origin(member) or member for member in field_types.members(key.hint)]
        found += [(*path, name)] if {str, typing.Literal} & set(kinds) else []
        found += places(key.section, (*path, name)) if key.section else []
        found += [(*path, name, "A_NAME"), (*path, name, None)] if dict in kinds else []
        found += [(*path, name, 0)] if tuple in kinds else []
    return found


def put(tree: dict, path: tuple, text: str) -> dict:
    """A configuration in which ``text`` stands at ``path``; None as its last part puts it as a key."""
    *parents, last = path
    node = tree
    for part, after in itertools.pairwise([*parents, last]):
        if not isinstance(node.get(part), dict | list):
            node[part] = [] if after == 0 else {}
        node = node[part]
    if last == 0:
        parents_node = tree
        for part in parents[:-1]:
            parents_node = parents_node[part]
        parents_node[parents[-1]] = [text]
    elif last is None:
        node[text] = "1"
    else:
        node[last] = text
    return tree


ALL = places()
RULES = ("prepare_data", "tokenize_data", "prepare_model", "convert_checkpoint", "verify_model")
SETTINGS = ("preflight", "plan", "refine_plan", "train", "smoke_test", "serve")


def shell_lines(experiment: Experiment) -> list[str]:
    """What rules put into their shell commands, as arguments of a command that comes before."""
    lines = [f" {experiment.arguments(rule)}" for rule in RULES]
    lines += [
        f" {experiment.operational_arguments(rule)}" for rule in ("prepare_model", "convert_checkpoint", "verify_model")
    ]
    lines += [
        f" {shlex.quote(text(rule))}" for rule in SETTINGS for text in (experiment.settings, experiment.operational)
    ]
    lines += [f" {experiment.render_arguments(rule)}" for rule in ("train", "smoke_test", "serve", "preflight")]
    lines += [f" {shlex.quote(experiment.environment(stage).python)}" for stage in ("train", "serve")]
    return lines


def shell_of(experiment: Experiment) -> str:
    """The same as arguments of a command that does nothing."""
    return "\n".join(f":{line}" for line in shell_lines(experiment))


def exports_of(experiment: Experiment) -> str:
    """The lines of an sbatch script that carry a configuration's text, without what starts programs."""
    names = {
        "project": "/tmp",
        "experiment": "x",
        "results": "r",
        "logs": "l",
        "python": experiment.environment("train").python,
    }
    more = {"activate": "", "accelerator": "cpu", "ranks_per_node": 2, "preflight": False, "spare_nodes": 0}
    variables = {name: str(value) for name, value in experiment.config["train"]["environment"].items()}
    script = sbatch.render("train", sbatch.Allocation(nodes=1), names | more | {"environment": variables})
    return "\n".join(re.findall(r"^export (?:[^\n']|'[^']*')*$", script, re.MULTILINE))


def test_every_text_of_a_configuration_stays_text(tmp_path):
    chance = random.Random(200)
    pairs = [(place, attack) for place in ALL for attack in ATTACKS]
    accepted, texts = 0, []
    for place, attack in chance.sample(pairs, min(CASES, len(pairs))):
        try:
            experiment = Experiment.from_config(put(base(), place, attack))
        except BadInputError:
            continue
        accepted += 1
        texts += [shell_of(experiment), exports_of(experiment)]
    assert accepted > CASES / 20
    script = tmp_path / "all.sh"
    script.write_text("\n".join(texts))
    done = subprocess.run(["bash", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["all.sh"]
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""


@pytest.mark.parametrize("place", [place for place in ALL if place not in (("results",), ("experiment",))], ids=str)
def test_what_is_accepted_reaches_a_program_letter_for_letter(place, tmp_path):
    attack = f"a b'c\"d\\$({TOUCH})\n`x`"
    try:
        experiment = Experiment.from_config(put(base(), place, attack))
    except BadInputError:
        return
    commands = "".join(f"show{line}\n" for line in shell_lines(experiment))
    script = tmp_path / "all.sh"
    script.write_text("show() { printf '%s\\0' \"$@\"; }\n" + commands)
    printed = subprocess.run(["bash", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    words = printed.stdout.split("\0")
    whole = attack in words or any(attack in text for word in words for text in strings(word))
    assert whole or shlex.quote(attack) not in commands
    assert [path.name for path in tmp_path.iterdir()] == ["all.sh"]


def strings(word: str) -> list[str]:
    """All texts in a word that is JSON."""
    try:
        waiting, found = [json.loads(word)], []
    except ValueError:
        return [word]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
    return found


# What stands unquoted in shell texts of rules, each with why it cannot hold anything but plain text.
PLAIN = {
    "RESULTS", "LOGS", "SCRIPT", "rule", "folder", "name",  # place.check_results, our own names
    "receipt(rule)", "place", "rendering", "judged", "command", "arguments", "more", "allocation",  # made of the others
}  # fmt: skip


def test_rules_put_no_new_value_into_a_shell_unquoted():
    unknown = []
    for path in sorted(PROJECT.glob("workflow/rules/*.smk")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "shell" not in line and "script(" not in line and ".py " not in line and "stage(" not in line:
                continue
            for found in re.findall(r"(?<!\{)\{([^{}]+)\}(?!\})", line):
                calls = ("path_from(", "operational", "literal(", "render(", "quote(", "allocation_of")
                if found not in PLAIN and not found.startswith(calls) and not found.endswith(":q"):
                    unknown.append(f"{path.name}:{number}: {{{found}}}")
    # Snakemake's own: joined by shlex, made of RESULTS and LOGS, or numbers of the profile.
    known = ("EXPERIMENT.render_arguments(rule)", "{params.arguments}", "{input.", "{output.", "{resources.", "{log}")
    assert [line for line in unknown if not any(name in line for name in known)] == []


@pytest.mark.parametrize(
    ("overlay", "key"),
    [
        ({"data": {"sources": ["~/chats.jsonl"]}}, "data.sources[0]"),
        ({"data": {"sources": ["openai=~/chats.jsonl"]}}, "data.sources[0]"),
        ({"data": {"sources": [{"path": "~/chats.jsonl"}]}}, "data.sources[0]"),
        ({"data": {"tokenizer": "~/base"}}, "data.tokenizer"),
        ({"model": {"base": "~/base", "tiny": None}}, "model.base"),
        ({"results": "~/results"}, "results"),
        ({"smoke_test": {"prompts": "~/p.jsonl"}}, "smoke_test.prompts"),
        ({"serve": {"api_key_file": "~/key"}}, "serve.api_key_file"),
        ({"train": {"secrets_file": "~/s"}}, "train.secrets_file"),
        ({"envs": {"train": {"python": "~/x/bin/python"}}}, "envs.train.python"),
    ],
)
def test_home_is_not_expanded_and_so_refused(overlay, key):
    with pytest.raises(BadInputError) as raised:
        Experiment.from_config(config.merge(base(), overlay))
    assert key in raised.value.problem
    assert str(Path.home()) in raised.value.problem
