"""A client of the OpenAI-compatible API that keeps a transcript of all it sends and receives."""

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from . import answer_fields, request_deadlines
from .answer_fields import CheckFailed as CheckFailed  # part of what a client needs

GET_TIMEOUT_S = 10
LONGEST_TRANSCRIBED = 60_000  # characters of one request or answer
MOST_RECEIVED = 1 << 28  # bytes of one answer: log-probabilities of 160,000 tokens are a twentieth of it
MOST_STREAMED = 1 << 26  # bytes


class CheckSkipped(Exception):
    """A check does not apply here; the text says why."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """A chat answer, streamed or not.

    Attributes:
        reasoning: text of ``reasoning`` (``reasoning_content`` before vLLM 0.12), empty if there was none.
        answer: text of ``content``, empty if there was none.
        finish_reason: ``stop``, ``length``, ….
        prompt_tokens, completion_tokens: as the server counts them.
        token_ids: prompt and answer, where the server gave them.
        seconds: until the last byte.
        first_token_s: until the first text of a streamed answer.
        pieces: number of streamed pieces that carried text.
        in_order: whether no reasoning came after the answer had begun.
        done: whether a stream ended with ``[DONE]``.
    """

    reasoning: str = ""
    answer: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    token_ids: tuple[list[int], list[int]] | None = None
    seconds: float = 0.0
    first_token_s: float | None = None
    pieces: int = 0
    in_order: bool = True
    done: bool = False


class Api:
    """Requests to one served model.

    Args:
        url: ``http://host:port``, with or without ``/v1``.
        model: its served name.
        timeout_s: deadline of one request, from its start to its last byte.
        api_key: sent as bearer token if not empty.
        transcript: JSONL file that gets one line per exchange as it happens.
    """

    def __init__(self, url: str, model: str, timeout_s: float, api_key: str = "", transcript: Path | None = None):
        self.model = model
        self.timeout_s = timeout_s
        self.check = ""  # name of the running check, for the transcript
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # trust_env=False: a site's proxy variables must not carry requests to a compute node.
        self._client = httpx.Client(
            base_url=url.rstrip("/").removesuffix("/v1"),
            headers=headers,
            timeout=timeout_s,
            transport=request_deadlines.transport(),
            trust_env=False,
        )
        self._transcript = open(transcript, "w", encoding="utf-8") if transcript else None  # noqa: SIM115
        self._lock = threading.Lock()

    def close(self) -> None:
        self._client.close()
        if self._transcript:
            self._transcript.close()

    def get(self, path: str) -> httpx.Response:
        """GET with a short deadline of its own: these answers need no computing."""
        return self._exchange("GET", path, None, GET_TIMEOUT_S)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """POST a JSON body."""
        return self._exchange("POST", path, body, self.timeout_s)

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> httpx.Response:
        """One request and its whole answer, within ``timeout_s`` in all; noted, whatever becomes of it."""
        begin = time.monotonic()
        status, received = None, bytearray()
        try:
            with (
                request_deadlines.within(timeout_s),
                self._client.stream(method, path, json=body, timeout=timeout_s) as response,
            ):
                status = response.status_code
                for part in response.iter_bytes():
                    received += part
                    _limit(len(received), MOST_RECEIVED)
        except httpx.HTTPError as error:
            self._note(path, body, status, received.decode("utf-8", "replace"), begin, repr(error))
            raise
        whole = httpx.Response(status, content=bytes(received))
        self._note(path, body, status, whole.text, begin)
        return whole

    def chat_body(self, messages: list[dict[str, str]], max_tokens: int, **options: Any) -> dict[str, Any]:
        """A chat request. Temperature 0 is spelled out: servers apply the model's generation_config.json otherwise."""
        return {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0} | options

    def chat(self, messages: list[dict[str, str]], max_tokens: int, **options: Any) -> Reply:
        """Ask for an answer in one piece.

        Raises:
            CheckFailed: any status but 200, or a body that is no chat completion.
        """
        begin = time.monotonic()
        response = self.post("/v1/chat/completions", self.chat_body(messages, max_tokens, **options))
        value = parsed(response)
        choice = answer_fields.objects(value, "choices")[0]
        message, usage = answer_fields.mapping(choice, "message"), answer_fields.mapping(value, "usage")
        ids = answer_fields.ids(value, "prompt_token_ids"), answer_fields.ids(choice, "token_ids")
        return Reply(
            reasoning=reasoning_of(message),
            answer=answer_fields.text(message, "content"),
            finish_reason=answer_fields.text(choice, "finish_reason") or None,
            prompt_tokens=answer_fields.count(usage, "prompt_tokens"),
            completion_tokens=answer_fields.count(usage, "completion_tokens"),
            token_ids=ids if all(ids) else None,
            seconds=time.monotonic() - begin,
        )

    def stream(self, messages: list[dict[str, str]], max_tokens: int, **options: Any) -> Reply:
        """Ask for a streamed answer and put it together; raises like ``chat``."""
        options |= {"stream": True, "stream_options": {"include_usage": True}}
        body = self.chat_body(messages, max_tokens, **options)
        begin = time.monotonic()
        reply, raw, status, problem = Reply(), [], None, ""
        try:
            with (
                request_deadlines.within(self.timeout_s),
                self._client.stream("POST", "/v1/chat/completions", json=body) as response,
            ):
                status = response.status_code
                for line in _lines(response):
                    raw.append(line)
                    if status != 200:
                        continue
                    if line.startswith("event:") and line[6:].strip() == "error":
                        raise CheckFailed("the stream carries an error event")
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        reply = dataclasses.replace(reply, done=True)
                        break
                    reply = _extended(reply, data, time.monotonic() - begin)
                if status != 200:
                    raise CheckFailed(f"status {status}: {' '.join(raw)[:300]}")
        except (httpx.HTTPError, CheckFailed) as error:
            problem = repr(error)
            raise
        finally:
            self._note("/v1/chat/completions", body, status, "\n".join(raw), begin, problem)
        return dataclasses.replace(reply, seconds=time.monotonic() - begin)

    def note(self, command: str, exit_code: int, output: str, begin: float) -> None:
        """Note a program that sent requests of its own."""
        self._note(command, None, exit_code, output, begin)

    def _note(self, path: str, body: Any, status: int | None, text: str, begin: float, problem: str = "") -> None:
        if not self._transcript:
            return
        request = json.dumps(body, ensure_ascii=False)
        entry = {
            "check": self.check,
            "path": path,
            "request": body if len(request) <= LONGEST_TRANSCRIBED else request[:LONGEST_TRANSCRIBED] + "…",
            "status": status,
            "seconds": round(time.monotonic() - begin, 3),
            "response": text if len(text) <= LONGEST_TRANSCRIBED else text[:LONGEST_TRANSCRIBED] + "…",
        }
        if problem:
            entry["problem"] = problem
        with self._lock:
            self._transcript.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._transcript.flush()


def _limit(received: int, most: int) -> None:
    if received > most:
        raise httpx.ReadError(f"the answer has more than {most >> 20} MiB")


def _lines(response: httpx.Response) -> Iterator[str]:
    """Lines of an event stream as they come. They end with LF alone: U+2028 and its like may stand inside JSON."""
    received, rest = 0, b""
    for part in response.iter_bytes():
        received += len(part)
        _limit(received, MOST_STREAMED)
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace").rstrip("\r")
    if rest:
        yield rest.decode("utf-8", "replace")


def parsed(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a 200 answer; raises CheckFailed for anything else."""
    if response.status_code != 200:
        raise CheckFailed(f"status {response.status_code}: {response.text[:300]}")
    try:
        value = response.json()
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckFailed(f"not a JSON object: {response.text[:300]}")
    return _no_error(value)


def _no_error(value: dict[str, Any]) -> dict[str, Any]:
    """An answer or a streamed piece that is no error: vLLM's engine may fail after the status 200 is sent."""
    if value.get("error") is not None or value.get("object") == "error":
        raise CheckFailed(f"the server reports an error: {answer_fields.shown(value.get('error', value))}")
    return value


def reasoning_of(message: dict[str, Any]) -> str:
    """Reasoning of a message or a streamed piece, under either of its names."""
    return answer_fields.text(message, "reasoning") or answer_fields.text(message, "reasoning_content")


def _extended(reply: Reply, data: str, seconds: float) -> Reply:
    """``reply`` with one more streamed piece."""
    try:
        piece = json.loads(data)
    except (ValueError, RecursionError):
        piece = None
    if not isinstance(piece, dict):
        raise CheckFailed(f"not a piece of a streamed chat completion: {data[:300]}")
    reasoning = answer = finish = ""
    if _no_error(piece).get("choices") != []:  # the last piece, of the counts, has none
        choice = answer_fields.objects(piece, "choices")[0]
        delta = answer_fields.mapping(choice, "delta")
        reasoning, answer = reasoning_of(delta), answer_fields.text(delta, "content")
        finish = answer_fields.text(choice, "finish_reason")
    tokens = reply.prompt_tokens, reply.completion_tokens
    if piece.get("usage") is not None:
        usage = answer_fields.mapping(piece, "usage")
        tokens = answer_fields.count(usage, "prompt_tokens"), answer_fields.count(usage, "completion_tokens")
    first = reply.first_token_s
    return dataclasses.replace(
        reply,
        reasoning=reply.reasoning + reasoning,
        answer=reply.answer + answer,
        finish_reason=finish or reply.finish_reason,
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
        first_token_s=seconds if first is None and (reasoning or answer) else first,
        pieces=reply.pieces + bool(reasoning or answer),
        in_order=reply.in_order and not (reasoning and reply.answer),
    )
