"""Promises of the judgement over all nodes' reports: who is blamed, and who is not."""

import pytest

from deepseek_sft.preflight import judge, table
from deepseek_sft.preflight.findings import Finding
from deepseek_sft.settings import field_types
from deepseek_sft.settings.preflight import CHECKS, Checks

HOSTS = ["a", "b", "c", "d"]


def report(rank: int, **changes) -> dict:
    """A report of a node with which nothing is wrong."""
    values = {
        "host": HOSTS[rank],
        "rank": rank,
        "findings": [Finding("host_memory", True, "plenty", "2 TiB").as_json()],
        "same": {"software": {"torch": "2.13.0", "deepspeed": "0.18.9"}, "gpus": {"driver": "580.1"}},
        "reached": {host: None for host in HOSTS if host != HOSTS[rank]},
        "clock": [0.0, 0.001],
        "shared": {"wrote": True, "reads": HOSTS[(rank + 1) % 4]},
        "load": {},
    }
    return values | changes


def reports(**by_host) -> dict[int, dict]:
    return {rank: report(rank, **by_host.get(host, {})) for rank, host in enumerate(HOSTS)}


def problems(found: dict[int, dict], skip: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    return [(problem.node, problem.check) for problem in judge.problems(HOSTS, found, skip, 1.0)]


def test_healthy_nodes_have_no_problems():
    assert problems(reports()) == []


def test_failed_check_names_its_node():
    bad = Finding("disk", False, "1 GB free, wanted are 7 TB").as_json()
    assert problems(reports(c={"findings": [bad]})) == [("c", "disk")]


def test_check_that_fails_everywhere_is_no_node_s_fault():
    bad = {"findings": [Finding("disk", False, "full").as_json()]}
    found = judge.problems(HOSTS, reports(a=bad, b=bad, c=bad, d=bad), (), 1.0)
    assert [(problem.node, problem.check) for problem in found] == [("", "disk")]
    assert judge.bad_nodes(found) == []


def test_silent_node_is_named_and_is_not_named_again_as_unreachable():
    found = reports(**{host: {"reached": {"c": "no answer"}} for host in "abd"})
    del found[2]
    assert problems(found) == [("c", "report")]


def test_closed_port_is_blamed_on_its_node_and_not_on_those_that_call_it():
    closed = {"reached": {"c": "no answer"}}
    assert problems(reports(a=closed, b=closed, d=closed)) == [("c", "ports")]


def test_node_that_reaches_nobody_is_blamed_itself():
    lost = {"reached": {"a": "No route to host", "b": "No route to host", "d": "No route to host"}}
    assert problems(reports(c=lost)) == [("c", "ports")]


def test_broken_shared_folder_is_blamed_on_the_writer_not_on_the_reader():
    unwritten = Finding("shared_files", False, "writing failed: No space left on device").as_json()
    unread = Finding("shared_files", False, "the file of c has not shown up").as_json()
    c = {"findings": [unwritten], "shared": {"wrote": False, "reads": "d"}}
    assert problems(reports(b={"findings": [unread]}, c=c)) == [("c", "shared_files")]


def test_other_package_version_is_named_with_the_usual_one():
    same = {"software": {"torch": "2.13.0", "deepspeed": "0.0.7"}}
    (problem,) = judge.problems(HOSTS, reports(b={"same": same}), (), 1.0)
    assert (problem.node, problem.check) == ("b", "software")
    assert "deepspeed 0.0.7, 0.18.9 on the others" in problem.text


def test_missing_package_is_a_difference():
    (problem,) = judge.problems(HOSTS, reports(b={"same": {"software": {"torch": "2.13.0"}}}), (), 1.0)
    assert "deepspeed absent, 0.18.9 on the others" in problem.text


def test_without_a_majority_all_that_differ_are_named():
    other = {"same": {"gpus": {"driver": "570.0"}}}
    assert {node for node, _ in problems(reports(a=other, b=other))} == {""}
    (problem,) = judge.problems(HOSTS, reports(a=other, b=other), (), 1.0)
    assert "driver 570.0" in problem.text


def test_clock_is_compared_with_most_nodes_even_where_the_first_node_s_is_wrong():
    ahead = {"clock": [90.0, 0.001]}  # the first node's clock is 90 s ahead of b's, c's and d's
    (problem,) = judge.problems(HOSTS, reports(b=ahead, c=ahead, d=ahead), (), 1.0)
    assert (problem.node, problem.check) == ("a", "clock")
    assert "+90.000 s off" in problem.text


def test_clock_within_its_uncertainty_is_not_blamed():
    assert problems(reports(b={"clock": [1.5, 0.8]})) == []
    assert problems(reports(b={"clock": [1.5, 0.1]})) == [("b", "clock")]


@pytest.mark.parametrize("check", ["clock", "ports"])
def test_check_that_is_switched_off_blames_nobody(check):
    found = reports(b={"clock": [50.0, 0.1], "reached": {"a": "no answer", "c": "no answer", "d": "no answer"}})
    assert check not in {name for _, name in problems(found, (check,))}


# ------------------------------------------------------------------------------------------------------ under load


def loaded(speeds: dict[str, float], **more) -> dict[int, dict]:
    fine = Finding("all_reduce", True, "").as_json()
    return {
        rank: {
            "host": host,
            "findings": [fine],
            "load": {"gb_per_second": speeds[host]} | {key: value[host] for key, value in more.items()},
        }
        for rank, host in enumerate(HOSTS)
    }


def test_bandwidth_above_the_floor_is_reported():
    assert judge.under_load(HOSTS, loaded(dict.fromkeys(HOSTS, 300.0)), 160.0) == ([], 300.0)
    assert judge.under_load(HOSTS, loaded(dict.fromkeys(HOSTS, 3.0)), None) == ([], 3.0)


def test_node_that_is_slow_with_both_neighbours_is_named():
    pairs = {"a": {1: 40.0, 3: 300.0}, "b": {0: 40.0, 2: 41.0}, "c": {1: 41.0, 3: 300.0}, "d": {2: 300.0, 0: 300.0}}
    found, speed = judge.under_load(HOSTS, loaded(dict.fromkeys(HOSTS, 40.0), pairs=pairs), 160.0)
    assert [problem.node for problem in found] == ["b"]
    assert "40.00 GB/s with a" in found[0].text
    assert speed == 40.0


def test_network_that_is_slow_only_as_a_whole_blames_no_node():
    pairs = {host: {(rank + 1) % 4: 300.0} for rank, host in enumerate(HOSTS)}
    found, _ = judge.under_load(HOSTS, loaded(dict.fromkeys(HOSTS, 40.0), pairs=pairs), 160.0)
    assert [problem.node for problem in found] == [""]


def test_node_slow_in_both_directions_of_the_ring_is_named_and_a_single_slow_link_names_both_ends():
    to = {host: HOSTS[(rank + 1) % 4] for rank, host in enumerate(HOSTS)}
    both, _ = judge.under_load(HOSTS, loaded({"a": 0.1, "b": 0.1, "c": 5.0, "d": 5.0}, to=to), 1.0)
    assert [problem.node for problem in both] == ["b"]
    one, _ = judge.under_load(HOSTS, loaded({"a": 0.1, "b": 5.0, "c": 5.0, "d": 5.0}, to=to), 1.0)
    assert {problem.node for problem in one} == {"a", "b"}


def test_first_rank_to_fail_is_blamed_not_those_it_takes_along():
    found = loaded(dict.fromkeys(HOSTS, 1.0))
    for rank, moment in ((1, 20.0), (2, 10.0), (3, 21.0)):
        found[rank]["findings"] = [Finding("all_reduce", False, f"rank {rank} ended with 1").as_json()]
        found[rank]["load"] = {"failed_at": moment}
    (problem,) = judge.under_load(HOSTS, found, None)[0]
    assert problem.node == "c"
    assert "2 more nodes failed with it" in problem.text


def test_table_shows_what_is_bad_and_leaves_unused_columns_out():
    bad = Finding("disk", False, "full", "1 GiB").as_json()
    found = reports(c={"findings": [bad]})
    del found[3]
    listed = judge.problems(HOSTS, found, ("clock",), 1.0)
    rows = table.rows(HOSTS, found, listed, ("clock",))
    assert rows[2]["disk"] == "BAD 1 GiB"
    assert rows[3]["memory"] == "silent"
    assert rows[0]["clock"] == "off"
    lines = table.text(rows).splitlines()
    assert [line.split()[0] for line in lines] == ["node", *HOSTS]
    assert "infiniband" not in lines[0]


def test_every_check_of_the_configuration_exists_and_the_other_way_round(project):
    assert field_types.keys(Checks)["skip"].choices == tuple(CHECKS)
