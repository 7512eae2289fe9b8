"""The live page: what it shows, who gets it, how seldom it asks, and what it outlives."""

import html
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from unit.report import results as made
from unit.report.page import Page as Parsed
from unit.report.running import PATIENCE_S, Served, Site

from deepseek_sft.errors import BadInputError
from deepseek_sft.report import live, live_server, slurm_jobs

REPOSITORY = Path(__file__).resolve().parents[3]
CANARY = "hf_CanaryCanaryCanary42Canary"
RUNNING = "55|RUNNING|rule_train demo abc|node[1-2]|gpu|26:10|3-21:33:50|None"
WAITING = "71|PENDING|rule_convert_checkpoint demo abc||cpu|0:00|4:00:00|Priority"


@pytest.fixture
def site(tmp_path, monkeypatch):
    found = Site(tmp_path, monkeypatch)
    found.training(steps=60, total=240)
    found.log("train", "55", "0: step 60/240\n")
    found.squeue(RUNNING, WAITING)
    return found


@pytest.fixture
def watched(site):
    return live.Watched(site.results, site.logs)


@pytest.fixture
def plain(watched, monkeypatch):
    """The same without plots, which take longest."""
    monkeypatch.setattr(live.plots, "training", lambda *_: [])
    monkeypatch.setattr(live.plots_experts, "experts", lambda *_: [])
    return watched


def text_of(page: live.Page, part: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page.parts[part].decode())).split())


def drawn(page: live.Page) -> list[str]:
    return re.findall(r'data-plot="([\w-]+)"', page.parts["plots"].decode())


@pytest.fixture
def served():
    pages = iter(range(1000))
    found = Served(lambda: live.Page.of({"state": f"<p>{next(pages)}</p>", "plots": "x" * 2000, "log": ""}))
    yield found
    found.end()


def test_page_shows_what_status_and_the_report_do(site, watched):
    with open(site.run / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps(made.line(61) | {"validation_loss": 0.4321, "useful_slots": 0.93}) + "\n")
    page = watched.page()
    state = text_of(page, "state")
    assert "train, running" in state
    for words in (
        "of 240 (25.4 %)",
        "validation 0.4321 after step 61",
        "before clipping",
        "93% of token slots",
        "of the rank with the most",
    ):
        assert words in state
    for words in ("to the last step", "step_25, 1.00 GiB", "more checkpoints", "55 RUNNING on node[1-2]"):
        assert words in state
    assert "71 convert_checkpoint PENDING Priority cpu" in state
    assert drawn(page) == ["loss", "grad-norm", "speed", "slots", "memory", "expert-load", "expert-balance"]
    assert "circles: validation loss" in text_of(page, "plots")
    assert "step 60/240" in text_of(page, "log")


def test_job_of_another_project_or_experiment_is_not_shown(site, plain):
    other = WAITING.replace("71|", "72|").replace(" demo ", " other ")
    site.squeue(RUNNING, other)
    rows = site.root / "bin" / "rows"
    rows.write_text(rows.read_text() + WAITING.replace("71|", "73|") + "|/elsewhere\n")
    page = plain.page().parts["state"].decode()
    assert re.findall(r'<tr><th scope="row">(\d+)</th>', page) == ["55"]


def test_failed_stage_is_shown_with_its_reason(site, plain):
    site.log("train", "55", f"0: step 60\nerror: node2 died {made.HOSTILE}\n  fix: run it again\n")
    (site.logs / "train" / "do-not-retry").write_text("attempt 1 ended with exit code 3\n")
    site.squeue()
    state = plain.page().parts["state"].decode()
    assert "Why train failed" in state and "fix: run it again" in state
    assert "<script" not in state and "&lt;script" in state


def test_secrets_in_a_log_are_hidden(site, plain):
    site.log("train", "55", f"export WANDB_API_KEY=hunter2\nerror: no access with {CANARY}\n")
    page = plain.page()
    assert not any(secret in part for part in page.parts.values() for secret in (b"hunter2", CANARY.encode()))
    assert "(hidden)" in text_of(page, "log")


def test_plots_are_drawn_again_only_when_the_metrics_have_changed(site, watched, monkeypatch):
    first = watched.page()
    monkeypatch.setattr(live.plots, "training", lambda *_: pytest.fail("drawn without a change"))
    assert watched.page().parts["plots"] == first.parts["plots"]
    monkeypatch.undo()
    with open(site.run / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps(made.line(61)) + "\n")
    assert watched.page().tags["plots"] != first.tags["plots"]


@pytest.mark.parametrize("content", ["", "{", '{"step": 1, "loss": "x", "seconds": null}\n'])
def test_torn_files_do_not_stop_the_page(site, watched, content):
    for name in ("metrics.jsonl", "expert_load.jsonl", "settings.json", "step_25/committed.json"):
        (site.run / name).write_text(content)
    for path in (site.results / "config.yaml", site.results / "receipts/plan.json"):
        path.write_text(content)
    assert "train, running" in text_of(watched.page(), "state")


def test_page_goes_on_when_the_run_has_ended(site, watched):
    watched.page()
    made.write_results(site.root)
    site.squeue()
    (site.logs / "train.log").unlink()
    page = watched.page()
    assert "Complete: every stage passed" in text_of(page, "state")
    assert "loss" in drawn(page)


def test_page_follows_the_newest_run(site, plain):
    plain.page()
    newer = site.results / "train/runs/aaaa"
    shutil.copytree(site.run, newer)
    os.utime(newer / "settings.json", (2**31, 2**31))
    (newer / "metrics.jsonl").write_text(json.dumps(made.line(7)) + "\n")
    assert "step 7 of 240" in text_of(plain.page(), "state")


def test_looking_writes_nothing(site, plain):
    before = {path: path.stat().st_mtime_ns for path in site.root.rglob("*")}
    plain.page()
    assert {path: path.stat().st_mtime_ns for path in site.root.rglob("*")} == before


def test_experiment_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="has not started"):
        live.Watched(tmp_path / "none", None).page()


def test_queue_is_asked_seldom_and_less_often_where_it_is_slow():
    now, asked = [0.0], []

    def ask():
        asked.append(now[0])
        now[0] += took
        return answer

    seldom = slurm_jobs.Seldom(ask, clock=lambda: now[0])
    took, answer = 0.1, ["job"]
    for _ in range(100):
        assert seldom() == answer
        now[0] += 1
    assert len(asked) == 4  # in 100 seconds
    took, answer = 20.0, None
    while now[0] < 4000:
        seldom()
        now[0] += 1
    assert len(asked) < 4 + 4000 / slurm_jobs.RARELY_S + 5
    assert asked[-1] - asked[-2] >= slurm_jobs.RARELY_S


def test_page_asks_the_queue_once_for_many_looks(site, plain):
    for _ in range(5):
        plain.page()
    site.squeue()  # what it would say now
    assert "node[1-2]" in text_of(plain.page(), "state")


def test_nothing_is_done_while_nobody_looks(monkeypatch):
    monkeypatch.setattr(live, "LOOKED_S", -1.0)
    made_pages = []
    refreshing = live.Refreshing(lambda: made_pages.append(1) or live.Page.of({"state": ""}), every=0)
    refreshing.start()
    refreshing.look()
    assert refreshing.end(PATIENCE_S)
    assert len(made_pages) == 1


def test_page_that_cannot_be_made_leaves_the_one_before_and_says_why():
    failed, again = threading.Event(), threading.Event()
    content = "first"

    def make():
        nonlocal content
        if failed.is_set():
            again.wait(PATIENCE_S)
            return live.Page.of({"state": "second"})
        if content == "first":
            content = ""
            return live.Page.of({"state": "first"})
        failed.set()
        raise BadInputError("no experiment at results/demo", "")

    refreshing = live.Refreshing(make, every=0)
    refreshing.start()
    assert failed.wait(PATIENCE_S)
    with refreshing._changed:
        assert refreshing._changed.wait_for(lambda: refreshing.trouble, PATIENCE_S)
        assert refreshing.page.parts["state"] == b"first"
        assert refreshing.trouble == "no experiment at results/demo"
    again.set()
    with refreshing._changed:
        assert refreshing._changed.wait_for(lambda: refreshing.page.parts["state"] == b"second", PATIENCE_S)
        assert refreshing.trouble == ""
    assert refreshing.end(PATIENCE_S)


def test_defect_is_told_once_in_the_shell_and_the_page_stays(capsys, monkeypatch):
    monkeypatch.setattr(live, "SHARE", 0)
    made_pages, often = [], threading.Event()

    def make():
        made_pages.append(1)
        if len(made_pages) == 1:
            return live.Page.of({"state": "first"})
        if len(made_pages) > 4:
            often.set()
        raise ValueError("what nobody thought of")

    refreshing = live.Refreshing(make, every=0)
    refreshing.start()
    assert often.wait(PATIENCE_S)
    assert refreshing.end(PATIENCE_S)
    assert capsys.readouterr().err.count("Traceback") == 1
    assert (refreshing.page.parts["state"], refreshing.trouble) == (b"first", "ValueError: what nobody thought of")


def test_end_waits_for_the_page_that_is_being_made():
    """Python aborts where it ends beside a thread that draws."""
    begun, go_on, done = threading.Event(), threading.Event(), []

    def make():
        if refreshing_began:
            begun.set()
            go_on.wait(PATIENCE_S)
            done.append(1)
        return live.Page.of({"state": ""})

    refreshing_began = False
    refreshing = live.Refreshing(make, every=0)
    refreshing_began = True
    refreshing.start()
    assert begun.wait(PATIENCE_S)
    assert refreshing.end(0.0) is False
    go_on.set()
    assert refreshing.end(PATIENCE_S) is True
    assert done == [1]


def test_whole_page_holds_its_parts_and_may_run_its_own_script_alone(served):
    answer = served.get()
    assert answer.status == 200
    page = answer.content.decode()
    assert "<p>0</p>" in page
    assert [tag for tag, _ in Parsed(page).tags].count("script") == 1
    assert live_server.SCRIPT in page
    policy = answer.getheader("Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert answer.getheader("Referrer-Policy") == "no-referrer"


def test_part_that_has_not_changed_is_not_sent_again(served):
    first = served.get("plots")
    again = served.get("plots", **{"If-None-Match": first.getheader("ETag")})
    assert (first.status, again.status, again.content) == (200, 304, b"")
    assert served.get("plots", **{"Accept-Encoding": "gzip"}).getheader("Content-Encoding") == "gzip"


@pytest.mark.parametrize("path", ["/", "/state", "/favicon.ico", "//", "/a/state", "/../", "/%00/", "//["])
def test_without_the_token_nothing_is_told(served, path):
    answer = served.get(path, token=False)
    assert answer.status == 404
    assert served.server.token.encode() not in answer.content and b"<p>" not in answer.content


def test_beginning_of_the_token_is_not_enough(served):
    token = served.server.token
    for path in (f"/{token[:-1]}/", f"/{token}", f"/{token}x/", f"/x/{token}/"):
        assert served.get(path, token=False).status == 404


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1.example.org", "", "localhost.example.org:80", "[::1"])
def test_page_of_another_site_is_refused(served, host):
    assert served.get(Host=host).status == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8765", "LOCALHOST"])
def test_browser_at_the_other_end_of_a_tunnel_is_served(served, host):
    assert served.get(Host=host).status == 200


def test_port_that_is_taken_is_said(served):
    with pytest.raises(BadInputError, match=f"port {served.port} of 127.0.0.1 cannot be used"):
        live_server.Server(served.port, served.refreshing, "demo")


def test_page_is_on_the_loopback_interface_alone(served):
    assert served.server.socket.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_but_reading_is_answered(served, method):
    assert served.get(method=method).status == 501


def test_words_that_are_no_request_end_their_connection_alone(served):
    with socket.create_connection(("127.0.0.1", served.port), PATIENCE_S) as connection:
        connection.sendall(b"\x16\x03\x01\x00garbage\r\n\r\n")
        connection.recv(1000)
    assert served.get().status == 200


def test_program_prints_address_and_tunnel_and_ends_in_peace(site):
    command = [sys.executable, REPOSITORY / "workflow/scripts/watch.py", "results/demo"]
    with subprocess.Popen(command, cwd=site.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = [process.stdout.readline() for _ in range(4)]
        address = urlsplit(said[1].strip())
        assert f"ssh -N -L {address.port}:127.0.0.1:{address.port} " in said[2]
        connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=PATIENCE_S)
        connection.request("GET", address.path)
        assert b"train, running" in connection.getresponse().read()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
        assert process.stderr.read() == ""
