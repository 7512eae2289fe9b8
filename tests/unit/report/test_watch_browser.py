"""The live page as a reader sees it, in headless Chromium: whole in every look, and changing while it is open.

Skipped where no Chromium is installed. REPORT_SCREENSHOTS=<folder> keeps the screenshots.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from unit.report import results as made
from unit.report.looks import FAULTS, WIDTHS
from unit.report.running import BEFORE_TRAIN, PATIENCE_S, Served, Site

from deepseek_sft.report import live

PROGRAM = chromium.find()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason=f"no Chromium is installed (looked for {', '.join(chromium.NAMES)})"
)
STEPS = 10_000
RUNNING = "55|RUNNING|rule_train demo abc|node[1-32]|gpu|26:10|3-21:33:50|None"
WAITING = "71|PENDING|rule_convert_checkpoint demo abc||cpu|0:00|4:00:00|Priority"
NOTE = "document.getElementById('note').textContent"
STEP = "document.querySelector('.cards .value').textContent"


def metrics(steps: int) -> str:
    held_out = {"validation_loss": 0.31, "useful_slots": 0.93, "host_memory_gib": 210.4}
    return "".join(json.dumps(made.line(step) | held_out) + "\n" for step in range(1, steps + 1))


def training(site: Site) -> None:
    site.training(steps=1, total=2 * STEPS)
    (site.run / "metrics.jsonl").write_text(metrics(STEPS))
    site.log("train", "55", "".join(f"0: [node 0 rank 0] step {step}/{2 * STEPS}, loss 0.3\n" for step in range(40)))
    site.squeue(RUNNING, WAITING)


def queued(site: Site) -> None:
    made.write_results(site.root, BEFORE_TRAIN)
    (site.run / "metrics.jsonl").unlink()
    site.squeue(WAITING.replace("convert_checkpoint", "train"))


def failed(site: Site) -> None:
    site.training(steps=60, total=240)
    site.log("train", "55", f"warning: {'long' * 90}\nerror: node2 died {made.HOSTILE}\n  fix: run it again\n")
    (site.logs / "train" / "do-not-retry").write_text("attempt 1 ended with exit code 3\n")
    site.squeue()


def finished(site: Site) -> None:
    made.write_results(site.root)
    site.squeue()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[chromium.Chromium]:
    with chromium.running(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Iterator[dict[str, Served]]:
    """The page of an experiment that trains, waits, has failed, is finished."""
    served = {}
    with pytest.MonkeyPatch.context() as patch:
        for begin in (training, queued, failed, finished):
            site = Site(tmp_path_factory.mktemp(begin.__name__), patch)
            begin(site)
            served[begin.__name__] = Served(live.Watched(site.results, site.logs).page)
    yield served
    for one in served.values():
        one.end()


def wait_for(browser: chromium.Chromium, expression: str, words: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while words not in (found := browser.evaluate(expression)):
        assert time.monotonic() < deadline, f"{words} does not come, there is: {found}"
        time.sleep(0.05)


@pytest.mark.parametrize("look", WIDTHS)
@pytest.mark.parametrize("name", ["training", "queued", "failed", "finished"])
def test_page_is_whole_in_every_look(browser, pages, name, look):
    width, dark = WIDTHS[look]
    browser.show(pages[name].server.address, width, dark)
    if folder := os.environ.get("REPORT_SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"watch-{name}-{look}.png")
    assert browser.complaints() == []
    assert browser.requests() == [pages[name].server.address]
    assert browser.evaluate(FAULTS) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width  # no scrolling sideways
    assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark


def test_ten_thousand_steps_load_as_a_thousand_do(browser, pages, tmp_path, monkeypatch):
    site = Site(tmp_path, monkeypatch)
    training(site)
    (site.run / "metrics.jsonl").write_text(metrics(1000))
    thousand = Served(live.Watched(site.results, site.logs).page)
    seen = {}
    for name, served in (("thousand", thousand), ("ten thousand", pages["training"])):
        monkeypatch.setattr(served.refreshing, "make", lambda: pytest.fail("made for one who comes"))
        browser.show(served.server.address, 1100)
        entry = "performance.getEntriesByType('navigation')[0]"
        seen[name] = browser.evaluate(f"{entry}.decodedBodySize")
        print(f"{name} steps: {browser.evaluate(f'{entry}.duration'):.0f} ms, {seen[name]:,} bytes")
    thousand.end()
    assert seen["ten thousand"] < 1.2 * seen["thousand"] < 300_000
    assert "10,000" in browser.evaluate(STEP)


def test_open_page_changes_with_the_run_and_says_when_the_watch_has_ended(browser, tmp_path, monkeypatch):
    site = Site(tmp_path, monkeypatch)
    site.training(steps=60, total=240)
    site.log("train", "55", "0: step 60/240\n")
    site.squeue(RUNNING)
    monkeypatch.setattr(live, "SHARE", 0)  # made again at once, however busy the machine is
    watched = live.Watched(site.results, site.logs)
    served = Served(watched.page, every=0.1)
    served.refreshing.start()
    browser.show(served.server.address, 1100)
    browser.evaluate("window.same = true")
    with open(site.run / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps(made.line(61)) + "\n" + json.dumps(made.line(62)))  # the last one by half
        stream.flush()
        wait_for(browser, STEP, "61")
        stream.write("\n")
    wait_for(browser, STEP, "62")
    site.log("train", "55", "0: step 62/240\n0: what comes next\n")
    wait_for(browser, "document.getElementById('log').textContent", "what comes next")
    assert browser.evaluate("window.same") is True  # it was not loaded anew
    assert browser.complaints() == []
    served.end()
    wait_for(browser, NOTE, "does not answer")
    assert browser.evaluate(STEP) == "62"  # what was seen last stays
    again = Served(watched.page, every=0.1, port=served.port)
    wait_for(browser, NOTE, "started anew")
    again.end()


def test_marked_words_are_not_taken_away(browser, pages):
    served = pages["queued"]
    browser.show(served.server.address, 1100)
    browser.evaluate("getSelection().selectAllChildren(document.querySelector('#state .verdict'))")
    before = browser.evaluate("getSelection().toString()")
    assert "queued" in before
    browser.evaluate("document.getElementById('note').textContent = document.getElementById('state').dataset.tag = ''")
    browser.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    wait_for(browser, NOTE, "As of")
    assert browser.evaluate("getSelection().toString()") == before


@pytest.mark.parametrize("name", ["training", "failed"])
def test_hostile_text_stays_text(browser, pages, name):
    browser.show(pages[name].server.address, 1100)
    assert browser.evaluate("document.scripts.length + document.images.length") == 1
    assert (made.HOSTILE in browser.evaluate("document.body.textContent")) is (name == "failed")
