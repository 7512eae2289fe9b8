"""What keeps a job from ever starting: judged from what Slurm 22.05 printed (fixtures/site), and from others' forms."""

import dataclasses
import time
from pathlib import Path

import pytest

from deepseek_sft.errors import BadInputError
from deepseek_sft.site import accounts, notation, partition_limits, questions, start_check
from deepseek_sft.site.answers import Person, Site, Wanted

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "site"
ALICE = Person("alice", ("users", "physics"), root=False)
JOB = Wanted(nodes=1, cpus=1, mem_mb=1000, runtime=5)


def text(name: str) -> str:
    return (FIXTURES / f"{name}.txt").read_text()


def site(accounting: bool = True, person: Person = ALICE, **changed: str) -> Site:
    """The captured site; ``config``, ``partition``, ``node`` … may be given as other text."""
    names = ["config", "partition", "node", "reservation"]
    names += ["associations", "of_accounts", "qos", "users"] if accounting else []
    plural = {"partition": "partitions", "node": "nodes", "reservation": "reservations"}
    values = {plural.get(name, name): changed.get(name, text(name)) for name in names}
    if not accounting:
        values["config"] = changed.get(
            "config", "ClusterName = vcluster\nAccountingStorageType = accounting_storage/none\n"
        )
    return Site.from_text(**values, person=person)


def keys(one: Site, **values) -> list[str]:
    return [problem.resource for problem in partition_limits.problems(dataclasses.replace(JOB, **values), one)]


# ------------------------------------------------------------------------------------------------ Slurm's notations


@pytest.mark.parametrize(
    ("written", "minutes"),
    [
        ("1-00:00:00", 1440),
        ("7-00:00:00", 10080),
        ("00:10:00", 10),
        ("2-12", 3600),
        ("90", 90),
        ("0:30", 1),
        ("1-0:30", 1470),
    ],
)
def test_times_of_slurm_are_read_as_minutes(written, minutes):
    assert notation.minutes(written) == minutes


@pytest.mark.parametrize("written", ["UNLIMITED", "INFINITE", "NONE", "N/A", "", "soon"])
def test_no_time_is_no_limit(written):
    assert notation.minutes(written) is None


@pytest.mark.parametrize(
    ("written", "counts"),
    [
        ("gpu:h100:8(S:0-1)", {("gpu", "h100"): 8}),
        ("gpu:8(S:0,1),nvme:1", {("gpu", ""): 8, ("nvme", ""): 1}),
        ("gpu:a100:4(IDX:0-3),gpu:v100:2", {("gpu", "a100"): 4, ("gpu", "v100"): 2}),
        ("gpu", {("gpu", ""): 1}),
        ("gpu:nvidia_h100_80gb_hbm3:8", {("gpu", "nvidia_h100_80gb_hbm3"): 8}),
        ("(null)", {}),
        ("", {}),
    ],
)
def test_generic_resources_are_counted_by_name_and_type(written, counts):
    assert notation.gres(written) == counts


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("gpu-n", ["gpu-n"]),
        ("(null)", []),
    ],
)
def test_host_lists_are_expanded(written, names):
    assert notation.hosts(written) == names


def test_a_word_in_a_nodes_reason_changes_none_of_its_facts():
    line = (
        "NodeName=n1 State=DOWN Partitions=a OS=Linux 6.1 #1 SMP Reason=disk State=IDLE bad [root@2026-01-01T00:00:00]"
    )
    (record,) = notation.records(line)
    assert (record["State"], record["OS"], record["Reason"].split()[0]) == ("DOWN", "Linux 6.1 #1 SMP", "disk")


# ------------------------------------------------------------------------------------- what no partition can ever run

IMPOSSIBLE = [
    ({"nodes": 4}, "nodes"),
    ({"cpus": 17}, "cpus_per_task"),
    ({"mem_mb": 200001}, "mem_mb"),
    ({"gres": "gpu:9"}, "gres"),
    ({"gres": "gpu:a100:1"}, "gres"),
    ({"gres": "nvme:1"}, "gres"),
    ({"constraint": "a100"}, "constraint"),
    ({"constraint": "h100&a100"}, "constraint"),
    ({"exclude": "node1", "nodes": 3}, "exclude"),
    ({"exclude": "node[7-8]"}, "exclude"),
    ({"nodelist": "node7"}, "nodelist"),
    ({"reservation": "tomorrow"}, "reservation"),
    ({"reservation": "other"}, "reservation"),  # of another account
    ({"reservation": "week", "nodes": 3}, "reservation"),  # which holds two
    ({"partition": "gone"}, "slurm_partition"),
    ({"partition": "closed"}, "slurm_partition"),
    ({"partition": "short", "runtime": 11}, "runtime"),
    ({"partition": "short", "nodes": 3}, "nodes"),
    ({"partition": "short", "mem_mb": 64001}, "mem_mb"),
    ({"partition": "short", "cpus": 9}, "cpus_per_task"),
    ({"partition": "wide"}, "nodes"),
    ({"account": "funded"}, "slurm_account"),
    ({"partition": "funded"}, "slurm_account"),
    ({"qos": "urgent"}, "qos"),
    ({"qos": "gone"}, "qos"),
    ({"partition": "urgent"}, "qos"),
    ({"qos": "short", "runtime": 11}, "runtime"),
    ({"qos": "short", "nodes": 3}, "nodes"),
    ({"account": "narrow", "nodes": 3}, "nodes"),
    ({"runtime": 1441}, "runtime"),  # a day for the default account
]


@pytest.mark.parametrize(("values", "key"), IMPOSSIBLE, ids=lambda value: str(value))
def test_job_that_can_never_start_is_refused_by_its_key(values, key):
    assert keys(site(), **values) == [key]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"nodes": 3, "cpus": 16, "mem_mb": 200000, "gres": "gpu:h100:8"},
        {"gres": "gpu:8"},
        {"constraint": "h100|a100"},
        {"constraint": "[h100*2|a100]"},
        {"exclude": "node1", "nodes": 2},
        {"reservation": "week", "nodes": 2},
        {"partition": "short", "runtime": 10, "nodes": 2, "mem_mb": 64000, "cpus": 8},
        {"partition": "wide", "nodes": 2},
        {"qos": "short", "runtime": 10, "nodes": 2},
        {"account": "narrow", "nodes": 2},
        {"account": "PROJECT"},
        {"runtime": 1440},
    ],
    ids=str,
)
def test_job_that_can_start_is_let_through(values):
    assert keys(site(), **values) == []


def test_what_is_wrong_and_what_to_write_are_said():
    (problem,) = partition_limits.problems(dataclasses.replace(JOB, partition="short", runtime=40), site())
    assert problem.text == "40 minutes, but partition short allows 10 minutes"
    assert problem.fix.startswith("write runtime: 10 or less")
    assert "slurm_partition: cpu or train or serve" in problem.fix


def test_each_key_that_is_wrong_is_told_at_once():
    assert keys(site(), partition="short", runtime=40, nodes=3, mem_mb=70000) == ["runtime", "nodes", "mem_mb"]


def test_one_of_several_partitions_is_enough_unless_the_site_wants_all():
    config = text("config")
    strict = site()
    lenient = site(config="\n".join(line for line in config.splitlines() if "EnforcePartLimits" not in line))
    assert keys(strict, partition="short,train", runtime=11) == ["runtime"]
    assert keys(lenient, partition="short,train", runtime=11) == []
    assert keys(lenient, partition="short,closed", runtime=11) == ["runtime"]


def test_nodes_of_different_sizes_count_only_where_they_are_large_enough():
    nodes = "\n".join(
        f"NodeName=node{i} CPUTot={cpus} RealMemory={memory} MemSpecLimit=1000 Gres={gres} State=IDLE"
        for i, (cpus, memory, gres) in enumerate(
            [(96, 500000, "gpu:h100:8"), (96, 500000, "gpu:h100:8"), (32, 90000, "")], 1
        )
    )
    mixed = site(False, node=nodes)
    assert keys(mixed, nodes=2, cpus=96, gres="gpu:8", mem_mb=499000) == []
    assert keys(mixed, nodes=3, gres="gpu:8") == ["gres"]
    (problem,) = partition_limits.problems(dataclasses.replace(JOB, nodes=3, cpus=64), mixed)
    assert problem.fix == "write cpus_per_task: 32 or less"
    (problem,) = partition_limits.problems(dataclasses.replace(JOB, nodes=2, mem_mb=500000), mixed)
    assert problem.fix == "write mem_mb: 499000 or less"


def test_nodes_out_of_service_are_a_warning_and_count():
    wanted = dataclasses.replace(JOB, nodes=3)
    assert partition_limits.problems(wanted, site()) == []
    (warning,) = partition_limits.warnings(wanted, site())
    assert "node3: idle+drain, bad DIMM" in warning
    assert partition_limits.warnings(dataclasses.replace(JOB, nodes=2), site()) == []


def test_powered_down_cloud_nodes_are_no_reason_to_warn():
    nodes = "NodeName=node1 CPUTot=16 RealMemory=200000 Gres=gpu:h100:8 State=IDLE+CLOUD+POWERED_DOWN"
    assert partition_limits.warnings(JOB, site(False, node=nodes)) == []


MIXED = "".join(
    f"NodeName=node{number} CPUTot=16 RealMemory={memory} Gres=gpu:{kind}:8(S:0-1) State=IDLE\n"
    for number, kind, memory in ((1, "a100", 500000), (2, "h100", 900000), (3, "h100", 900000))
)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"gres": "gpu:8", "nodes": 2}, True),
        ({"gres": "gpu:h100:8", "nodes": 2}, False),
        ({"gres": "gpu:8", "nodes": 2, "mem_mb": 600000}, False),  # which only one kind has
        ({"gres": "gpu:8", "nodes": 1}, False),
        ({"nodes": 2}, False),
    ],
)
def test_a_job_that_may_get_two_kinds_of_gpus_is_told(asked, told):
    row = "PartitionName=gpu Default=YES MaxTime=UNLIMITED Nodes=node[1-3] State=UP"
    found = partition_limits.warnings(dataclasses.replace(JOB, **asked), site(False, node=MIXED, partition=row))
    assert len(found) == told
    if told:
        assert "partition gpu (1 of a100, 2 of h100)" in found[0] and "write gres: gpu:h100:8" in found[0]


@pytest.mark.parametrize("state", ["DOWN", "DRAIN", "INACTIVE"])
def test_partition_that_is_not_up_is_refused(state):
    row = f"PartitionName=gpu Default=YES MaxTime=UNLIMITED Nodes=node[1-3] State={state}"
    assert keys(site(False, partition=row)) == ["slurm_partition"]


@pytest.mark.parametrize(
    ("field", "values", "key"),
    [
        ("AllowGroups=chemistry", {}, "slurm_partition"),
        ("RootOnly=YES", {}, "slurm_partition"),
        ("ReqResv=YES", {}, "reservation"),
        ("DenyAccounts=project", {}, "slurm_account"),
        ("DenyQos=normal", {}, "qos"),
        ("AllowGroups=physics", {}, None),
        ("DenyAccounts=small", {}, None),
        ("MaxMemPerCPU=10000", {"mem_mb": 160001}, "mem_mb"),
    ],
)
def test_whom_a_partition_takes(field, values, key):
    row = f"PartitionName=gpu Default=YES MaxTime=UNLIMITED Nodes=node[1-3] State=UP {field}"
    assert keys(site(partition=row), **values) == ([key] if key else [])


def test_cluster_without_a_default_partition_wants_one_named():
    row = "PartitionName=gpu Default=NO MaxTime=UNLIMITED Nodes=node[1-3] State=UP"
    assert keys(site(False, partition=row)) == ["slurm_partition"]
    assert keys(site(False, partition=row), partition="gpu") == []


def test_partition_whose_nodes_slurm_does_not_show_is_not_judged():
    assert keys(site(False, node=""), nodes=1000, cpus=1000) == []


# --------------------------------------------------------------------------------------------- accounts and QOS


def with_qos(**columns: str) -> Site:
    """A site where the default QOS has these limits."""
    header, normal, *others = text("qos").splitlines()
    names, row = header.split("|"), normal.split("|")
    for name, value in columns.items():
        row[names.index(name)] = value
    return site(qos="\n".join([header, "|".join(row), *others]))


@pytest.mark.parametrize(
    ("columns", "values", "key"),
    [
        ({"MaxTRES": "cpu=32"}, {"nodes": 3, "cpus": 11}, "cpus_per_task"),
        ({"MaxTRES": "mem=500G"}, {"nodes": 3, "mem_mb": 171000}, "mem_mb"),
        ({"MaxTRESPU": "gres/gpu=8"}, {"nodes": 2, "gres": "gpu:h100:8"}, "gres"),
        ({"GrpTRES": "gres/gpu:h100=8"}, {"nodes": 2, "gres": "gpu:h100:8"}, "gres"),
        ({"MaxTRESPerNode": "gres/gpu=4"}, {"gres": "gpu:8"}, "gres"),
        ({"MaxTRESMins": "cpu=100"}, {"cpus": 2, "runtime": 51}, "runtime"),
        ({"MinTRES": "node=2"}, {}, "nodes"),
        ({"MaxWall": "00:04:00"}, {}, "runtime"),
        ({"MaxTRES": "cpu=32"}, {"nodes": 2, "cpus": 16}, None),
        ({"MaxWall": "2-00:00:00"}, {"runtime": 2880}, None),  # the QOS's limit counts before the account's day
        ({"Flags": "PartitionTimeLimit"}, {"partition": "short", "runtime": 11}, None),
        ({"Flags": "PartitionMaxNodes"}, {"partition": "short", "nodes": 3}, None),
    ],
    ids=str,
)
def test_limits_of_a_qos(columns, values, key):
    assert keys(with_qos(**columns), **values) == ([key] if key else [])


def test_limits_that_the_site_does_not_enforce_are_none():
    config = (
        "ClusterName = vcluster\nAccountingStorageType = accounting_storage/slurmdbd\nAccountingStorageEnforce = none\n"
    )
    assert keys(site(config=config), runtime=1441) == []


def test_nobodys_user_is_told_that_he_has_no_account():
    header = text("associations").splitlines()[0]
    assert keys(site(associations=header, of_accounts="", users="")) == ["slurm_account"]


def test_two_jobs_at_once_are_refused_where_the_account_takes_one():
    wanted = {rule: dataclasses.replace(JOB, account="small") for rule in ("prepare_data", "prepare_model")}
    with pytest.raises(BadInputError, match=r"profile, jobs: account small takes 1 job of yours(.|\n)*write jobs: 1"):
        start_check.judge(wanted, site(), lambda rule, key: key, at_once=len)
    assert accounts.most_submitted(wanted["prepare_data"], site()) == ("account small", 1)
    wanted["prepare_model"] = JOB  # in another account
    start_check.judge(wanted, site(), lambda rule, key: key, at_once=len)


def test_the_profiles_key_and_the_rules_stand_in_the_message():
    wanted = {rule: dataclasses.replace(JOB, partition="closed") for rule in ("train", "preflight")}
    with pytest.raises(BadInputError) as caught:
        start_check.judge(wanted, site(), lambda rule, key: f"profile, set-resources: train: {key}", at_once=len)
    assert str(caught.value).count("profile, set-resources: train: slurm_partition") == 1
    assert "[train,preflight]" in str(caught.value)


# ------------------------------------------------------------------------------------------------------ asking


def programs(folder: Path, monkeypatch, **texts: str) -> None:
    for name, script in {"sbatch": "true", **texts}.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


class Asked:
    def wanted(self) -> Wanted:
        return JOB


def test_slurm_that_hangs_costs_seconds_and_a_warning(tmp_path, monkeypatch):
    programs(tmp_path, monkeypatch, scontrol="sleep 1000 & wait")
    monkeypatch.setattr(questions, "ANSWER_S", 0.5)
    monkeypatch.setattr(questions.ask, "__defaults__", (0.5,))
    begin = time.monotonic()
    (warning,) = start_check.check({"train": Asked()}, lambda rule, key: key, at_once=len)
    assert "has not answered" in warning
    assert "not checked" in warning
    assert time.monotonic() - begin < 60, "it waits for the tool"


def test_database_that_does_not_answer_leaves_the_other_limits(tmp_path, monkeypatch):
    show = "".join(f"*{what}) cat {FIXTURES}/{what}.txt;;" for what in ("config", "partition", "node", "reservation"))
    programs(
        tmp_path, monkeypatch, scontrol=f'case "$*" in {show} esac', sacctmgr="echo 'Connection refused' >&2; exit 1"
    )
    found, silent = questions.site()
    assert keys(found, nodes=4) == ["nodes"]
    assert keys(found, account="nobody") == []
    assert "Connection refused: limits of accounts and QOS are not checked" in silent[0]


def test_without_sbatch_the_place_to_run_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInputError, match="no sbatch here"):
        start_check.check({"train": Asked()}, lambda rule, key: key, at_once=len)


def test_what_only_sbatch_knows_is_a_warning(tmp_path, monkeypatch):
    say = "echo 'allocation failure: the site wants --licenses' >&2; exit 1"
    programs(tmp_path, monkeypatch, sbatch=f'[ "$1" = --test-only ] && {{ {say}; }}', scontrol="exit 1")
    assert questions.rehearse({"train": "--nodes=2 --exclude='gpu-'n"}) == [
        "train: `sbatch --test-only` says: the site wants --licenses"
    ]
