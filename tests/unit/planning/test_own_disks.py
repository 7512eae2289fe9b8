"""Promises of the plan on checkpoints that lie on the nodes' own disks."""

import dataclasses

import planning_models as models
import planning_plans as plans
import pytest
import yaml

from deepseek_sft import config
from deepseek_sft.planning import checkpoint_cost, own_disks, plan_text
from deepseek_sft.planning.settings import OwnDisks, Training

ALONE = dataclasses.replace(plans.training(4, "zero3_offload", 2), stock_experts=False, deal_rows=None)
BOTH = dataclasses.replace(ALONE, checkpoints=OwnDisks(every_s=900, keep=1))


def made(training, nodes: int, **changes):
    return plans.make(models.DEEPSEEK_V3, training, plans.cluster(nodes, **changes))


def test_a_nodes_disk_holds_its_files_and_its_neighbours_for_all_that_are_kept_and_the_one_being_written():
    found = made(BOTH, 32, local_gb_per_second=4.0)
    share = found.checkpoint / 32
    assert found.own_disks.disk == 2 * 2 * share
    assert found.own_disks.writing_s == pytest.approx(2 * share / 4e9 + share / (0.25 * 400e9))
    three = made(dataclasses.replace(BOTH, checkpoints=OwnDisks(every_s=900, keep=3)), 32)
    assert three.own_disks.disk == 2 * 4 * share


def test_the_update_waits_for_a_nodes_own_files_and_not_for_copies():
    chosen, cluster = BOTH, plans.cluster(10, local_gb_per_second=1.0)
    # 100 s of own files, as many of the neighbour's, 1 s on the network
    assert checkpoint_cost.stops_for_nodes(chosen, cluster, 1e12, (40, 500)) == [60, pytest.approx(20.1)]
    at_once = dataclasses.replace(chosen, async_save="off")
    assert checkpoint_cost.stops_for_nodes(at_once, cluster, 1e12, (40, 500)) == [pytest.approx(201)] * 2


def test_a_failure_costs_half_the_cadence_and_reading_back():
    found = made(BOTH, 32).own_disks
    assert found.after_failure_s[0] == pytest.approx(450 + found.reading_s)
    often, rare = (dataclasses.replace(BOTH, save_every_minutes=minutes) for minutes in (10, 60))
    assert made(rare, 32).own_disks.after_failure_s[1] == pytest.approx(
        made(often, 32).own_disks.after_failure_s[1] + 25 * 60
    )


def test_the_shared_storage_is_planned_for_the_failures_that_are_left():
    """Daly's interval grows with the root of the time between failures."""
    alone, both = made(ALONE, 256).duration, made(BOTH, 256).duration
    assert both.mtbf_s == alone.mtbf_s
    assert both.cadence_s / alone.cadence_s == pytest.approx((1 / 0.15) ** 0.5, rel=0.15)


def test_checkpoints_on_the_nodes_count_in_the_time_of_the_run():
    slow = {"local_gb_per_second": 0.5}
    assert made(BOTH, 32, **slow).duration.run.slowest > made(ALONE, 32, **slow).duration.run.slowest


def test_a_disk_that_is_too_small_does_not_fit_and_one_that_is_not_known_is_not_judged():
    assert made(BOTH, 32, local_bytes=2e12).verdict == "fits"
    assert "disk of a node" in made(BOTH, 32, local_bytes=0.5e12).exceeded
    assert "disk of a node" not in made(BOTH, 32).exceeded
    assert not [limit for limit in made(ALONE, 32).limits if limit.name == "disk of a node"]


def test_the_plan_speaks_of_own_disks_where_they_are_used_or_worth_it():
    many, few, used = (plan_text.text(made(*one)) for one in ((ALONE, 256), (ALONE, 2), (BOTH, 32)))
    assert "train: {checkpoints: [{path: FOLDER, every_minutes:" in many
    assert "own disks" not in few
    assert "on the nodes' own disks" in used and "a failure costs" in used
    assert own_disks.figures(made(ALONE, 32).own_disks, ALONE) == {}


def test_a_single_node_is_said_to_have_no_copy():
    found = made(BOTH, 1)
    assert "a single node has no neighbour" in plan_text.text(found)
    assert found.own_disks.disk == 2 * found.checkpoint
    assert checkpoint_cost.survived(BOTH, found.cluster) == 0
    assert made(ALONE, 1).own_disks is None


def test_the_shared_storages_entry_stands_before_the_keys_of_one_folder(project):
    resolved = config.resolve(yaml.safe_load((project / "config/config.yaml").read_text()))
    tiers = [{"path": "/local", "every_minutes": 15}, {"every_minutes": 99, "keep": 5}]
    found = Training.from_config(resolved["train"] | {"checkpoints": tiers}, resolved["plan"], models.DEEPSEEK_V3)
    assert (found.save_every_minutes, found.keep_checkpoints) == (99, 5)
    assert found.checkpoints == OwnDisks(every_s=900, keep=1)
    before = Training.from_config(resolved["train"], resolved["plan"], models.DEEPSEEK_V3)
    assert (before.save_every_minutes, before.keep_checkpoints, before.checkpoints) == (240, 2, None)
