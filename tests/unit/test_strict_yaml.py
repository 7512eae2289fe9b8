"""What a person writes into a configuration is read as it is meant, or refused with its line: never otherwise."""

import os
import random
from pathlib import Path

import pytest
import yaml

from deepseek_sft import config, strict_yaml
from deepseek_sft.command_line import read_yaml
from deepseek_sft.errors import BadInputError

PROJECT = Path(__file__).resolve().parents[2]
SHIPPED = [PROJECT / "config/config.yaml", *sorted(PROJECT.glob("config/experiments/**/*.yaml"))]
PROFILES = sorted(PROJECT.glob("profiles/*/config.yaml"))
MUTATIONS = int(os.environ.get("YAML_MUTATIONS", "300"))  # in all; 10,000 were run


BOMB = "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}' if n else 'x'] * 10)}]\n" for n in range(7))


def read(folder: Path, content: str | bytes):
    path = folder / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_yaml(str(path))


@pytest.mark.parametrize("path", [*SHIPPED, *PROFILES], ids=lambda path: str(path.relative_to(PROJECT)))
def test_shipped_files_are_read_as_yaml_reads_them(path):
    assert read_yaml(str(path)) == (yaml.safe_load(path.read_text()) or {})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("train: {seed: 1}\nmodel: {}\ntrain: {seed: 2}\n", "line 3, column 1: the key `train` stands there twice"),
        ("train: {seed: 1}\nmodel: {}\ntrain: {seed: 2}\n", "(first in line 1), and the later one would win"),
        ("train:\n  seed: 1\n  max_steps: 3\n  seed: 2\n", "line 4, column 3: the key `seed` stands there twice"),
        ('{"train": {"seed": 1, "seed": 2}}', "the key 'seed' stands there twice"),
        ("train: {seed: 0777}\n", "line 1, column 15: `0777` is read as an octal number"),
        ("train: {seed: 1:30}\n", "`1:30` is read as a number to the base of 60"),
        ("train: {max_grad_norm: .inf}\n", "`.inf` is no number"),
        ("train: {learning_rate: .NaN}\n", "`.NaN` is no number"),
        ('{"train": {"max_grad_norm": Infinity}}', "Infinity is no number"),
        ("train: {learning_rate: 1.0e+999}\n", "too large"),
        (f"train: {{seed: {'9' * 5000}}}\n", "a number of 5000 digits"),
        (f'{{"train": {{"seed": {"9" * 5000}}}}}', "a number of 5000 digits"),
        ("data: {1: 2}\n", "the key `1` is a number, and keys are text"),
        ("data: {no: 2}\n", "the key `no` is true or false"),
        ("? {a: b}\n: c\n", "the key a list or mapping is no text"),
        ("~: 1\n", "the key `~` is null"),
        ("experiment: 2026-01-01\n", "read as a date"),
        ("experiment: 2026-13-45\n", "read as a date"),
        ("experiment: !!binary aGk=\n", "read as a binary"),
        ("experiment: !!bool maybe\n", "a tag (!!…) before a value"),
        ('experiment: !!int ""\n', "a tag (!!…) before a value"),
        ("experiment: !!set {a, b}\n", "type set"),
        ("experiment: !!python/name:os.system\n", "could not determine a constructor"),
        ("a: &a [*a]\n", "its aliases make more than"),
        (BOMB, "its aliases make"),
        ("[" * 3000, "nested more than"),
        ("a: " + "[" * 300 + "]" * 300, "nested more than 100 levels"),
        ("a: " + "[" * 90000 + "]" * 90000, "nested more than 100 levels"),
        ("__use_yte__: true\nexperiment: ?f'{1}'\n", "a template that runs Python"),
        ("experiment: z\xfcrich\n".encode("latin-1"), "is not UTF-8: line 1 holds bytes of another encoding"),
        ("experiment: a\n".encode("utf-16"), "is not UTF-8: it is UTF-16"),
        (b"\x80\x81\x82", "is not UTF-8"),
        ("experiment: a\0b\n", "line 1"),
        ("experiment: a\n---\nexperiment: b\n", "line 2"),
        ("- a\n- b\n", "holds no keys"),
        ("text", "holds no keys"),
    ],
)  # fmt: skip
def test_what_is_not_what_it_seems_is_refused_with_its_place(tmp_path, content, said):
    with pytest.raises(BadInputError) as raised:
        read(tmp_path, content)
    assert said in raised.value.problem
    assert raised.value.fix
    assert len(str(raised.value).splitlines()) <= 10


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("\ufeffexperiment: a\n", {"experiment": "a"}),
        ("x: &x {max_steps: 3}\ntrain: *x\n", {"x": {"max_steps": 3}, "train": {"max_steps": 3}}),
        ("train:\n  <<: {max_steps: 3}\n  seed: 5\n", {"train": {"max_steps": 3, "seed": 5}}),
        ('train: {seed: "0777", "1": a, on_plan: 1_000}\n', {"train": {"seed": "0777", "1": "a", "on_plan": 1000}}),
        ("a: 0\nb: -0\nc: 0.5\nd: 0x10\ne: '1:30'\n", {"a": 0, "b": 0, "c": 0.5, "d": 16, "e": "1:30"}),
        ('{"experiment": "a", "n": 3}', {"experiment": "a", "n": 3}),
    ],
)
def test_what_is_meant_as_it_stands_is_read(tmp_path, content, value):
    assert read(tmp_path, content) == value


ODD = [
    "0777", "1:30", ".inf", "-.INF", ".nan", "~", "null", "no", "yes", "2026-01-01", "!!int 'a'",
    "!!python/object:x {}", "&a [*a]", "*b", "[", "}", '"', "'", "\t", "\0", "\ufeff", "\u2028", "\ud7ff", "|", ">",
    "? ", ": ", "- ", "---\n",
    "...", "{a: b}", "1e400", "9" * 50, "-1", "0", "''", "💣", "%", "@", "`", "#", "<<: 1", "=",
    "__use_yte__: true", "0x", "0b2",
    "1_",
]  # fmt: skip


def mutated(chance: random.Random, text: str) -> str:
    """A configuration with one to three slips in it."""
    lines = text.splitlines(keepends=True)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(lines))
        line = lines[at]
        kind = chance.randrange(7)
        if kind == 0:
            lines.insert(chance.randrange(len(lines)), line)
        elif kind == 1 and ":" in line:
            lines[at] = f"{line.split(':', 1)[0]}: {chance.choice(ODD)}\n"
        elif kind == 2:
            place = chance.randrange(len(line) or 1)
            lines[at] = line[:place] + chance.choice(ODD) + line[place:]
        elif kind == 3:
            lines[at] = " " * chance.randint(0, 9) + line.lstrip()
        elif kind == 4:
            place = chance.randrange(len(line) or 1)
            lines[at] = line[:place] + line[place + 1 :]
        elif kind == 5 and ":" in line:
            lines[at] = line.replace(line.strip().split(":")[0], chance.choice(ODD), 1)
        else:
            lines[at] = f"{line.rstrip()}{chance.choice(ODD)}\n"
    return "".join(lines)


def test_mutated_configurations_are_read_or_refused_in_words(tmp_path):
    chance, ends = random.Random(18), {"read": 0, "refused": 0}
    texts = [path.read_text() for path in SHIPPED]
    base = yaml.safe_load(texts[0])
    for _ in range(MUTATIONS):
        content = mutated(chance, chance.choice(texts))
        try:
            found = read(tmp_path, content.encode("utf-8", "surrogatepass"))
            config.resolve(config.merge(base, found))
            ends["read"] += 1
        except BadInputError as error:
            assert error.fix or "\n  - " in error.problem, content
            ends["refused"] += 1
    assert min(ends.values()) > MUTATIONS / 20, ends


def test_loading_agrees_with_pyyaml_wherever_it_does_not_refuse():
    chance = random.Random(19)
    texts = [path.read_text() for path in SHIPPED]
    agreed = 0
    for _ in range(MUTATIONS // 5):
        content = mutated(chance, chance.choice(texts))
        try:
            found = strict_yaml.load(content)
        except (strict_yaml.Refused, yaml.YAMLError):
            continue
        assert found == yaml.safe_load(content)
        agreed += 1
    assert agreed
