"""An OpenAI-compatible server on loopback whose answers a function gives; for clients, in milliseconds."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[list[dict[str, str]], dict[str, Any]], dict[str, Any]]  # messages, request → parts of the answer


class Stub(ThreadingHTTPServer):
    """Keeps what it was asked in ``requests``, and the headers in ``keys``."""

    daemon_threads = True

    def __init__(self, answer: Answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.requests, self.keys = answer, [], set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self._send(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.keys.add(self.headers.get("Authorization"))
        given = {"reasoning": "", "content": "", "finish_reason": "stop", "status": 200}
        given |= self.server.answer(request["messages"], request)
        message = {"role": "assistant", "reasoning": given["reasoning"] or None, "content": given["content"] or None}
        choice = {"index": 0, "message": message, "finish_reason": given["finish_reason"]}
        usage = {"prompt_tokens": 5, "completion_tokens": 7}
        self._send(given["status"], {"object": "chat.completion", "choices": [choice], "usage": usage})

    def _send(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


@contextmanager
def serving(answer: Answer) -> Iterator[Stub]:
    server = Stub(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
