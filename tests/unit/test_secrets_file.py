"""Secrets come from a file that only its owner reads; the configuration, which everybody reads, refuses them."""

import os
from pathlib import Path

import pytest
import yaml

from deepseek_sft import config, secrets_file
from deepseek_sft.errors import BadInputError

PROJECT = Path(__file__).resolve().parents[2]
CANARY = "hf_CanaryCanaryCanary42Canary"


def problems(**overlay) -> str:
    base = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    demo = yaml.safe_load((PROJECT / "config/experiments/demo.yaml").read_text())
    try:
        config.resolve(config.merge(config.merge(base, demo), overlay))
    except BadInputError as error:
        return error.problem
    return ""


@pytest.mark.parametrize("section", ["train", "serve"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "x7") for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "MY_SECRET")),
        *(
            (name, "x7")
            for name in ("VLLM_API_KEY", "OPENAI_API_KEY", "hf_token", "SERVICE_CREDENTIALS", "PGPASSWORD_PWD")
        ),
        ("https_proxy", "http://user:pass@proxy:3128"),
        ("HTTPS_PROXY", "http://token@proxy"),
        ("SOMETHING", CANARY),
        ("ARGUMENTS", f"--auth Bearer {'a' * 20}"),
        ("PEM", "-----BEGIN RSA PRIVATE KEY-----"),
        ("CLOUD", "AKIAABCDEFGHIJKLMNOP"),
    ],
)
def test_variable_that_looks_like_a_secret_is_refused_without_its_value(section, name, value):
    said = problems(**{section: {"environment": {name: value}}})
    assert f"{section}.environment.{name}" in said
    assert f"{section}.secrets_file" in said
    assert value not in said.replace("secrets_file", "")


def test_flag_and_shell_line_that_hold_a_secret_are_refused_without_it():
    said = problems(serve={"engine_args": {"hf-token": CANARY}})
    assert "serve.engine_args.hf-token" in said and CANARY not in said
    own = {"python": "/x/python", "activate": f"module load cuda; export HF_TOKEN={CANARY} && source /x/activate"}
    said = problems(envs={"train": own})
    assert "envs.train.activate: HF_TOKEN" in said and CANARY not in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_SOCKET_IFNAME", "=ib0"), ("NCCL_IB_HCA", "mlx5"), ("NCCL_IB_PKEY", "0x8001"),
        ("TOKENIZERS_PARALLELISM", "true"), ("MAX_TOKENS", 4096), ("WANDB_API_KEY_FILE", "/home/me/key"),
        ("HF_TOKEN_PATH", "/x"), ("https_proxy", "http://proxy:3128"), ("NO_PROXY", "a@b"),
        ("HF_TOKEN", ""), ("VLLM_USE_TOKEN", 0), ("CXX", "g++"), ("SSH_AUTH_SOCK", "/tmp/s"),
    ],
)  # fmt: skip
def test_ordinary_variables_are_allowed(name, value):
    assert "environment" not in problems(train={"environment": {name: value}})


@pytest.mark.parametrize("name", ["A B", "A;touch x", "$(x)", "1A", "", "A\nB", "é", "A-B", "A=B"])
def test_name_that_is_none_of_a_variable_is_refused(name):
    assert "is no name of a variable" in problems(train={"environment": {name: "1"}})


def written(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "secrets"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_file_is_read_line_by_line(tmp_path):
    text = f"# mine\n\nHF_TOKEN={CANARY}\nexport QUOTED='a b'\nEQUALS=a=b\nSPECIAL=$(x) `y` \"z\n"
    found = secrets_file.read(written(tmp_path, text))
    assert found == {"HF_TOKEN": CANARY, "QUOTED": "a b", "EQUALS": "a=b", "SPECIAL": '$(x) `y` "z'}


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("A=1\n", 0o644, "can be read by other users (mode 0644)"),
        ("A=1\n", 0o640, "can be read by other users"),
        (f"A=1\n{CANARY}\n", 0o600, "line 2: it is not NAME=VALUE"),
        ("A B=1\n", 0o600, "line 1: it is not NAME=VALUE"),
        ("A=1\nA=2\n", 0o600, "line 2: A stands there twice"),
    ],
)
def test_file_that_is_open_or_broken_is_refused_without_what_it_says(tmp_path, text, mode, said):
    with pytest.raises(BadInputError) as raised:
        secrets_file.read(written(tmp_path, text, mode))
    assert said in raised.value.problem
    assert CANARY not in str(raised.value)


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(BadInputError):
            secrets_file.read(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_file_of_somebody_else_is_refused(tmp_path):
    path = written(tmp_path, "A=1\n")
    os.chown(path, 12345, -1)
    with pytest.raises(BadInputError, match="belongs to user 12345"):
        secrets_file.read(path)


@pytest.mark.parametrize(
    "line",
    [
        "export WANDB_API_KEY=hunter2",
        "0: serve --api-key hunter2 --port 8000",
        "--api-key=hunter2",
        '{"api_key": "hunter2", "port": 8000}',
        "{'hf_token': 'hunter2'}",
        "PASSWORD = 'hunter2 with spaces'",
        "error: password: hunter2",
        "cloning https://user:hunter2@example.org/x",
        "Authorization: Bearer hunter2hunter2",
        "token hf_hunter2hunter2hunter2hunter2",
        "aws_secret_access_key=hunter2&region=x",
    ],
)
def test_line_of_a_log_hides_what_looks_like_a_secret(line):
    shown = secrets_file.masked(line)
    assert "hunter2" not in shown
    assert secrets_file.HIDDEN in shown


@pytest.mark.parametrize(
    "line",
    [
        "0: step 60/240, loss 0.2724, 568 tokens/s, tokens: 3000",
        "pad_token: <pad>, eos_token=</s>",
        "error: unknown key: data.sources\n  fix: see config/README.md",
        "--token-index 5 --max-tokens 100",
        "trained_tokens=160000, HF_TOKEN=$HF_TOKEN",
        "http://node1:8000/v1 answers; mail a@b",
    ],
)
def test_line_of_a_log_without_secrets_is_shown_as_it_is(line):
    assert secrets_file.masked(line) == line
