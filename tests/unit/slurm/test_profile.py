"""A profile's resources as people and sinfo write them."""

from types import SimpleNamespace

import pytest
from snakemake_executor_plugin_slurm.validation import validate_slurm_extra

from deepseek_sft.errors import BadInputError
from deepseek_sft.slurm import profile_values

KEY = "profile, set-resources: train"


@pytest.mark.parametrize(
    ("name", "written", "taken"),
    [
        ("runtime", "1-00:00:00", 1440),
        ("runtime", "2-12", 3600),
        ("runtime", "24:00:00", 1440),
        ("gres", "gpu:h100:8(S:0-1)", "gpu:h100:8"),
        ("gres", "gpu:8(S:0,1)", "gpu:8"),
        ("runtime", "24h", None),  # Snakemake's own
        ("runtime", 90, None),
        ("gres", "gpu:8", None),
        ("gres", "", None),
        ("mem_mb", 1900000, None),
    ],
)
def test_what_sinfo_prints_is_understood(name, written, taken):
    assert profile_values.understood(name, written, KEY) == taken


@pytest.mark.parametrize(
    ("name", "written", "fix"),
    [
        ("runtime", "1h30m", "minutes"),
        ("runtime", "UNLIMITED", "minutes"),
        ("gres", "gpu:8,nvme:1", "write one kind, 'gpu:8'"),
        ("gres", "gpu:h100-sxm:8", "write gpu:8, and choose the kind of node by constraint"),
        ("mem_mb", 0, "sinfo"),
    ],
)
def test_what_cannot_be_passed_on_is_refused_with_the_spelling_that_can(name, written, fix):
    with pytest.raises(BadInputError) as caught:
        profile_values.understood(name, written, f"{KEY}: {name}")
    assert caught.value.problem.startswith(f"{KEY}: {name}: ")
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("extra", "fix"),
    [
        ("--exclusive --constraint=h100", "write constraint: h100 in its place"),
        ("--qos=long", "write qos: long in its place"),
        ("-p gpu", "write slurm_partition: gpu in its place"),
        ("-A project-7", "write slurm_account: project-7 in its place"),
        ("--mem=0", "write mem_mb: 0 in its place"),
        ("--time=10", "write runtime: 10 in its place"),
        ("--gpus=8", "write gres: 8 in its place"),
        ("--comment=x", "leave it out"),
        ("--exclude=gpu-n --exclusive", "write exclude: gpu-n beside slurm_extra"),
        ("--nodelist=node-J1", "write nodelist: node-J1 beside slurm_extra"),
    ],
)
def test_what_the_plugin_refuses_is_refused_at_start_with_the_key_to_write(extra, fix):
    with pytest.raises(BadInputError) as caught:
        profile_values.check_extra(extra, f"{KEY}: slurm_extra")
    assert caught.value.fix == fix


@pytest.mark.parametrize(
    "extra", ["", "--signal=USR1@3600 --exclusive", "--mail-type=END --dependency=singleton", "--hint nomultithread"]
)
def test_what_the_plugin_takes_is_let_through(extra):
    profile_values.check_extra(extra, KEY)


@pytest.mark.parametrize("nodes", ["node7", "node[1-3,7]", "gpu-n", "gpu-n,gpu-c", "node-J1", "a-p,b-t"])
def test_excluded_nodes_pass_the_plugin_whatever_their_names(nodes):
    extra = profile_values.with_option("--signal=USR1@3600 --exclusive", "--exclude", nodes)
    extra = profile_values.with_option(extra, "--reservation", "week")
    validate_slurm_extra(SimpleNamespace(resources=SimpleNamespace(slurm_extra=extra)))
    assert profile_values.from_extra(extra, "--exclude") == nodes
    assert profile_values.options(extra) == [
        "--signal=USR1@3600",
        "--exclusive",
        f"--exclude={nodes}",
        "--reservation=week",
    ]


def test_option_is_replaced_and_removed_with_its_value():
    extra = "--signal USR1@60 --exclude=a -x b"
    assert profile_values.with_option(extra, "--exclude", "c") == "--signal USR1@60 -x b --exclude=c"
    assert profile_values.with_option(extra, "--signal", "") == "--exclude=a -x b"


def test_unclosed_quote_is_told():
    with pytest.raises(BadInputError, match="quot"):
        profile_values.options("--mail-user='a")
