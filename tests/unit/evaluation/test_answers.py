"""Answers that a broken server may give: fields of another type, texts that are none, bytes that never end."""

import contextlib
import copy
import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from serving_fakes import MODEL, FakeServer, fake_server

from deepseek_sft.evaluation import held_out_losses, server_checks, speech
from deepseek_sft.evaluation.api import Api, CheckFailed, parsed
from deepseek_sft.evaluation.held_out import Prompt
from deepseek_sft.evaluation.server_checks import Context
from deepseek_sft.settings.smoke_settings import SmokeSettings

MISSING = object()
PROMPT = [{"role": "user", "content": "2 + 3?"}]


def changed(value: object, path: list, by: object) -> object:
    """``value`` with the entry at ``path`` replaced, where it has one."""
    value = copy.deepcopy(value)
    owner = value
    for step in path[:-1]:
        if not (isinstance(owner, list) and len(owner) > step) if isinstance(step, int) else step not in owner:
            return value
        owner = owner[step]
    last = path[-1]
    if not (len(owner) > last if isinstance(last, int) else isinstance(owner, dict) and last in owner):
        return value
    if by is MISSING:
        del owner[last]
    else:
        owner[last] = by
    return value


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        server.seconds, server.context = 0.0, 128
        yield server


@pytest.fixture
def shared(server) -> Iterator[Context]:
    """What checks share."""
    api = Api(f"http://127.0.0.1:{server.server_port}", MODEL, 60)
    context = Context(api, SmokeSettings(max_tokens=16), "deepseek_r1", [Prompt("a", PROMPT, None)])
    context.max_model_len = server.context
    yield context
    server.change = lambda value: value
    api.close()


def replace(server: FakeServer, path: list, by: object) -> None:
    """From now on the server replaces an entry of all its answers."""
    server.change = lambda value: changed(value, path, by)


def ask(shared: Context) -> object:
    return shared.api.chat(PROMPT, 16)


def stream(shared: Context) -> object:
    return shared.api.stream(PROMPT, 16)


def logprobs(shared: Context) -> object:
    return held_out_losses.served_logprobs(shared.api, [[5, 6, 7]], 1)


KINDS = {"null": None, "text": "much", "list": [{"type": "text", "text": "5"}], "missing": MISSING, "truth": True}
FIELDS = [
    (server_checks.model_name, ["data"], ""),
    (server_checks.model_name, ["data", 0], ""),
    (server_checks.model_name, ["data", 0, "id"], ""),
    (server_checks.model_name, ["data", 0, "max_model_len"], "null missing"),  # the checks that need it fail
    (server_checks.context_limit, ["usage"], ""),
    (server_checks.context_limit, ["usage", "total_tokens"], ""),
    (ask, ["choices"], ""),
    (ask, ["choices", 0], ""),
    (ask, ["choices", 0, "message"], ""),
    (ask, ["choices", 0, "message", "content"], "null text missing"),  # a check of its own wants an answer
    (ask, ["choices", 0, "message", "reasoning"], "null text missing"),
    (ask, ["choices", 0, "finish_reason"], "null text missing"),  # a check of its own wants "stop"
    (ask, ["choices", 0, "token_ids"], "null missing"),  # vLLM tells them since 0.10.2
    (ask, ["prompt_token_ids"], "null missing"),
    (ask, ["usage"], ""),
    (ask, ["usage", "prompt_tokens"], ""),
    (ask, ["usage", "completion_tokens"], ""),
    (stream, ["choices", 0], "missing"),  # as in the piece with the counts, which has none
    (stream, ["choices", 0, "delta"], ""),
    (stream, ["choices", 0, "delta", "content"], "null text missing"),
    (stream, ["choices", 0, "delta", "reasoning"], "null text missing"),
    (stream, ["choices", 0, "finish_reason"], "null text missing"),
    (stream, ["usage"], "null missing"),  # most pieces have none
    (stream, ["usage", "completion_tokens"], ""),
    (logprobs, ["choices", 0], ""),
    (logprobs, ["choices", 0, "prompt_logprobs"], ""),
    (logprobs, ["choices", 0, "prompt_logprobs", 1], ""),
    (logprobs, ["choices", 0, "prompt_logprobs", 1, "6"], ""),
    (logprobs, ["choices", 0, "prompt_logprobs", 1, "6", "logprob"], ""),
]


@pytest.mark.parametrize("kind", KINDS)
def test_field_of_another_type_fails_a_check_and_never_ends_in_a_traceback(server, shared, kind):
    for function, path, allowed in FIELDS:
        replace(server, path, KINDS[kind])
        try:
            function(shared)
            passed = True
        except CheckFailed:
            passed = False
        assert passed == (kind in allowed.split()), (function.__name__, path)


def test_answer_nested_too_deeply_to_be_read_fails_the_check():
    with pytest.raises(CheckFailed, match="not a JSON object"):
        parsed(httpx.Response(200, content=b'{"a":' + b"[" * 100_000))


def test_lone_surrogate_in_an_answer_can_be_written_to_a_file(server, shared):
    replace(server, ["choices", 0, "message", "content"], "5 \ud83d")
    assert ask(shared).answer.encode() == b"5 ?"


def test_line_separators_inside_a_streamed_text_do_not_cut_its_line(server, shared):
    server.raw = True
    replace(server, ["choices", 0, "delta", "content"], "a\u2028b\x85c")
    try:
        assert stream(shared).answer == "a\u2028b\x85c"
    finally:
        server.raw = False


# -- log-probabilities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "-1.0", math.nan, -math.inf, -9999.0, 3.0, [], True])
def test_log_probability_that_no_softmax_gives_is_not_usable(server, shared, value):
    replace(server, ["choices", 0, "prompt_logprobs", 2, "7", "logprob"], value)
    with pytest.raises(CheckFailed, match="no usable log-probabilities"):
        logprobs(shared)


def test_equal_log_probabilities_of_a_long_sequence_are_not_usable(shared):
    with pytest.raises(CheckFailed, match=r"all 65 tokens of a sequence have -1\.5"):
        held_out_losses.served_logprobs(shared.api, [list(range(66))], 1)


@pytest.mark.parametrize(
    ("loss", "words"), [(math.log(96), "guessing evenly"), (12.0, "guessing evenly"), (-0.01, "below 0")]
)
def test_loss_that_no_trained_model_has_fails_by_itself(loss, words):
    with pytest.raises(CheckFailed, match=words):
        held_out_losses.check_sane(loss, 96)


def test_loss_of_a_trained_model_is_sane():
    held_out_losses.check_sane(0.0, 96)
    held_out_losses.check_sane(math.log(96) - 0.01, 96)


# -- texts -------------------------------------------------------------------------------------------------------------

ESSAY = (
    "First I compare the tenths, since the whole parts agree. Four tenths are more than one tenth, so the second "
    "number is the larger one. To be sure, I subtract: the difference is positive. "
)


@pytest.mark.parametrize(
    "text",
    [
        "!" * 300,
        "\ufffd" * 40,
        "…",
        "the the the the " * 60,
        "wait, wait, " * 50,
        "嗯，" * 80,
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        ESSAY + "So the answer, so the answer is " + "the answer is " * 40,
        " ".join(["yes no", "no yes", "no no", "yes yes"][i % 7 % 4] for i in range(90)),
    ],
)
def test_text_that_says_nothing_is_recognised(text):
    assert speech.problem(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "是",
        "9.4",
        "hahaha",
        "No, no, no!",
        "10000000000000000000",
        ESSAY * 4,
        "The user asks for a sum. I add the two numbers and give the result. " * 4,
        "整数部分相同，再比较十分位：1和4，较大的是4。",
        "| 1 | 2 |\n|---|---|\n| 3 | 4 |",
        " ".join(map(str, range(500))),
    ],
)
def test_text_of_a_working_model_is_left_alone(text):
    assert speech.problem(text) == ""


# -- deadlines ---------------------------------------------------------------------------------------------------------


class _Drips(BaseHTTPRequestHandler):
    """Sends one byte after the other of ``server.what``, for ever."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        beginnings = {
            "headers": b"HTTP/1.1 200 OK\r\nX-Long: ",
            "body": b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n",
            "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\n",
        }
        with contextlib.suppress(OSError):
            self.wfile.write(beginnings[self.server.what])
            while not self.server.stopped.wait(0.02):
                self.wfile.write(b"a")

    do_POST = do_GET


@contextlib.contextmanager
def dripping(what: str) -> Iterator[Api]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Drips)
    server.daemon_threads, server.what, server.stopped = True, what, threading.Event()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    api = Api(f"http://127.0.0.1:{server.server_port}", MODEL, 0.5)
    try:
        yield api
    finally:
        server.stopped.set()
        api.close()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("what", ["headers", "body", "chunks"])
@pytest.mark.parametrize("how", ["chat", "stream"])
def test_deadline_holds_over_dripping_headers_bodies_and_streams(what, how):
    with dripping(what) as api, pytest.raises(httpx.TimeoutException):
        getattr(api, how)(PROMPT, 16)


def test_deadline_holds_for_a_stream_of_lines_that_say_nothing():
    with fake_server("stream_drips") as server:
        api = Api(f"http://127.0.0.1:{server.server_port}", MODEL, 0.5)
        begin = time.monotonic()
        with pytest.raises(httpx.TimeoutException):
            api.stream(PROMPT, 16)
        assert time.monotonic() - begin < 60
        api.close()


def test_next_request_has_a_deadline_of_its_own():
    with fake_server() as server:
        server.seconds = 0.4
        api = Api(f"http://127.0.0.1:{server.server_port}", MODEL, 10)
        for _ in range(2):
            assert api.chat(PROMPT, 16).answer
        api.close()


def test_endless_answer_ends_at_its_largest_size(monkeypatch):
    monkeypatch.setattr("deepseek_sft.evaluation.api.MOST_RECEIVED", 10)
    with fake_server() as server:
        api = Api(f"http://127.0.0.1:{server.server_port}", MODEL, 10)
        with pytest.raises(httpx.ReadError, match="more than"):
            api.chat(PROMPT, 16)
        api.close()


def test_transcript_has_the_lines_of_a_broken_stream(tmp_path):
    with fake_server("stream_error") as server:
        api = Api(f"http://127.0.0.1:{server.server_port}", MODEL, 10, transcript=tmp_path / "transcript.jsonl")
        with pytest.raises(CheckFailed, match="EngineCore"):
            api.stream(PROMPT, 16)
        api.close()
    (line,) = map(json.loads, (tmp_path / "transcript.jsonl").read_text().splitlines())
    assert "EngineCore" in line["response"]
