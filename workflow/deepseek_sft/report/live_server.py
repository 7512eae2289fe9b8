"""The page over HTTP on the loopback interface alone, under an address that nobody can guess.

Other users of a login node reach its loopback too, so every address begins with a random token. A page of another
site that a browser is led to by its own name server is refused by the Host header. Nothing is written, no input is
read, and no access is logged, since addresses hold the token.
"""

import base64
import dataclasses
import gzip
import hashlib
import hmac
import http.server
import re
import secrets
import socket
import time
import urllib.parse
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..errors import BadInputError
from . import build
from .live import Page, Refreshing

HOST = "127.0.0.1"
NAMES = re.compile(rf"({re.escape(HOST)}|localhost)(:\d+)?", re.IGNORECASE)  # by which a browser may call it
SCRIPT = (Path(build.TEMPLATES) / "watch.js").read_text(encoding="utf-8")
POLICY = "; ".join(
    (
        "default-src 'none'",
        "style-src 'unsafe-inline'",  # drawings carry styles
        "img-src data:",
        f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer, without what belongs to all."""

    status: int
    body: bytes = b""
    kind: str = "text/html; charset=utf-8"
    tag: str = ""


class Server(http.server.ThreadingHTTPServer):
    """Answers for one experiment.

    Attributes:
        token: first part of every address.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, refreshing: Refreshing, experiment: str):
        self.refreshing, self.experiment = refreshing, experiment
        self.token = secrets.token_urlsafe(18)
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise BadInputError(
                f"port {port} of {HOST} cannot be used: {error.strerror}", "name another --port, or none for a free one"
            ) from None

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{HOST}:{self.server_address[1]}/{self.token}/"

    def answer(self, host: str, path: str, tag: str) -> tuple[Answer, Page | None, str]:
        """What a request gets, of which page, and why that is an old one.

        Args:
            host: of the request's header.
            tag: of what the browser has.
        """
        if not NAMES.fullmatch(host):
            return Answer(403, b"this page is for browsers on 127.0.0.1 alone\n", "text/plain"), None, ""
        token, _, name = path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.token.encode()) or "/" not in path[1:]:
            return Answer(404, b"nothing here: open the address that the watch printed\n", "text/plain"), None, ""
        page, trouble = self.refreshing.look()
        if name == "":
            return Answer(200, self._whole(page, trouble)), page, trouble
        if name not in page.parts:
            return Answer(404, b"nothing here\n", "text/plain"), None, ""
        own = f'"{page.tags[name]}"'
        if tag.strip('"') == page.tags[name]:
            return Answer(304, tag=own), page, trouble
        return Answer(200, page.parts[name], tag=own), page, trouble

    def _whole(self, page: Page, trouble: str) -> bytes:
        return build.page(
            "watch.html.j2",
            experiment=self.experiment,
            every=self.refreshing.every,
            as_of=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(page.at)),
            trouble=trouble,
            parts={name: Markup(part.decode()) for name, part in page.parts.items()},
            tags=page.tags,
            script=Markup(SCRIPT),
        ).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection of a browser."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "deepseek-sft", ""
    timeout = 60
    server: Server

    def do_GET(self) -> None:
        answer, page, trouble = self.server.answer(
            self.headers.get("Host") or "", self.path.partition("?")[0], self.headers.get("If-None-Match") or ""
        )
        body = answer.body
        more = {"Age": str(max(0, round(time.time() - page.at)))} if page else {}
        more |= {"ETag": answer.tag} if answer.tag else {}
        more |= {"X-Trouble": urllib.parse.quote(trouble[:300])} if trouble else {}
        if len(body) > 1000 and "gzip" in (self.headers.get("Accept-Encoding") or ""):
            body, more = gzip.compress(body, 5), more | {"Content-Encoding": "gzip"}
        self.send_response(answer.status)
        self.close_connection = True  # a connection kept alive would be answered after the end
        for name, value in (HEADERS | more | {"Connection": "close"}).items():
            self.send_header(name, value)
        if answer.status != 304:
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and answer.status != 304:
            self.wfile.write(body)

    do_HEAD = do_GET

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the browser has gone

    def log_message(self, *_: Any) -> None:
        """Say nothing: the address holds the token."""


def tunnel(port: int, user: str) -> str:
    """The command that brings the page to a machine from which this one is reached by ssh."""
    return f"ssh -N -L {port}:{HOST}:{port} {user}@{socket.gethostname()}"
