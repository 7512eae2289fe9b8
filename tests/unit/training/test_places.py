"""Promises of the watchdog's places: whatever a hang is told to stand at can be put in the order of a step."""

import re
from pathlib import Path

import pytest

from deepseek_sft.training import watchdog

ENGINE = Path(watchdog.__file__).with_name("xtuner_engine")
NAMED = re.compile(r'(?:\.place = |\.begin\(|^WAITING = )"(\w+)"', re.MULTILINE)


def test_every_place_that_the_engine_names_has_its_turn_in_a_step():
    named = {place for path in ENGINE.glob("*.py") for place in NAMED.findall(path.read_text())}
    assert {"validation", "forward", "commit"} <= named <= set(watchdog.PLACES)


@pytest.mark.parametrize("place", watchdog.PLACES[1:])
def test_the_rank_that_came_least_far_is_suspected_wherever_the_others_stand(place):
    hangs = {0: place, 1: watchdog.PLACES[0], 2: place}
    records = [{"rank": rank, "hang": {"step": 4, "place": one, "waits": 0}} for rank, one in hangs.items()]
    assert watchdog.suspects(records, 3) == [1]
