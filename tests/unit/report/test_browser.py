"""The report as a reader sees it, in headless Chromium: all drawn, in every width and colour scheme, from one file.

Skipped where no Chromium is installed. REPORT_SCREENSHOTS=<folder> keeps the screenshots.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from unit.report import results as made
from unit.report.looks import CONTRAST, FAULTS, WIDTHS

from deepseek_sft import receipts
from deepseek_sft.report import build, compare

PROGRAM = chromium.find()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason=f"no Chromium is installed (looked for {', '.join(chromium.NAMES)})"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[chromium.Chromium]:
    with chromium.running(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


def failed_gate(root: Path) -> tuple[Path, Path]:
    """An experiment whose smoke test failed two checks: its results and logs."""
    results, logs = made.write_results(root, tuple(made.FIGURES)[:-1]), root / "logs" / "demo"
    checks = {name: {"passed": True, "detail": "fine"} for name in ("health", "chat")}
    checks |= {"held_out_loss": {"passed": False, "detail": "3.1 over 90 tokens, expected at most 1"}}
    checks |= {"held_out_format": {"passed": False, "detail": f"1 of 9 well formed; not: {made.HOSTILE}"}}
    receipts.write_failed(results / "receipts/smoke_test.json", "smoke_test", {"checks": checks})
    (logs / "smoke_test").mkdir(parents=True)
    (logs / "smoke_test/do-not-retry").write_text("attempt 1 ended with exit code 3")
    error = "error: the served model failed 2 of 4 checks:\n  held_out_loss: 3.1\n  fix: look at training\n"
    (logs / "smoke_test.log").write_text(f"0:   ok     health: fine\n{error}")
    return results, logs


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A finished experiment's report, that of one which failed, and a comparison."""
    root = tmp_path_factory.mktemp("pages")
    finished = made.write_results(root)
    broken = root / "broken"
    failed = made.write_results(broken, ("prepare_data", "tokenize_data"))
    logs = broken / "logs" / "demo"
    logs.mkdir(parents=True)
    (logs / "train.log").write_text(f"warning: {'long' * 90}\nerror: node2 died {made.HOSTILE}\n")
    other = root / "results" / "a-long-name-of-an-experiment-that-wraps-on-a-phone"
    shutil.copytree(finished, other)
    for path in (other / "receipts").glob("*.json"):
        path.write_text(path.read_text().replace("results/demo/", f"results/{other.name}/"))
    texts = {
        "finished": build.build(finished, None).html,
        "gate": build.build(*failed_gate(root / "gate")).html,
        "failed": build.build(failed, logs).html,
        "comparison": compare.compare([(finished, None), (other, None)]),
    }
    for name, text in texts.items():
        (root / f"{name}.html").write_text(text)
    return {name: root / f"{name}.html" for name in texts}


@pytest.mark.parametrize("look", WIDTHS)
@pytest.mark.parametrize("name", ["finished", "failed", "gate", "comparison"])
def test_page_is_whole_in_every_look(browser, pages, name, look):
    width, dark = WIDTHS[look]
    browser.show(pages[name], width, dark)
    if folder := os.environ.get("REPORT_SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"{name}-{look}.png")
    assert browser.complaints() == []
    assert browser.requests() == [pages[name].as_uri()]
    assert browser.evaluate(FAULTS) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width  # no scrolling sideways
    assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark


def test_every_plot_of_a_finished_experiment_is_drawn(browser, pages):
    browser.show(pages["finished"], 1100)
    names = browser.evaluate("[...document.querySelectorAll('svg')].map(svg => svg.dataset.plot)")
    assert names == [
        "loss",
        "lengths",
        "memory-plan",
        *("grad-norm", "speed", "memory", "expert-load", "expert-balance"),
        "throughput",
        *("serving", "before-after"),
    ]


@pytest.mark.parametrize("dark", [False, True])
def test_words_and_lines_stand_out_from_the_page(browser, pages, dark):
    browser.show(pages["finished"], 1100, dark)
    contrast = browser.evaluate(CONTRAST)
    assert min(value for name, value in contrast.items() if "series" not in name) >= 4.5, contrast
    assert min(contrast.values()) >= 3, contrast


def test_hostile_text_stays_text(browser, pages):
    for name in ("finished", "failed"):
        browser.show(pages[name], 1100)
        assert browser.evaluate("document.scripts.length + document.images.length") == 0
        assert made.HOSTILE in browser.evaluate("document.body.textContent")


def test_report_prints(browser, pages):
    browser.show(pages["finished"], 1100)
    pdf = browser.pdf()
    if folder := os.environ.get("REPORT_SCREENSHOTS"):
        (Path(folder) / "finished.pdf").write_bytes(pdf)
    assert pdf.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 30


def test_first_screen_of_a_failure_says_why(browser, pages):
    browser.show(pages["gate"], 1100)
    inside = "[...document.querySelectorAll('.why dd, .why pre')].map(e => e.getBoundingClientRect().bottom)"
    assert max(browser.evaluate(inside)) < 900
