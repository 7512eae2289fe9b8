"""Deadlines of whole requests: httpx limits only the silence between two bytes, so that a server which drips them, in
headers, in a body or in a stream, would hold a request for ever."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpcore
import httpx

WRITTEN_AT_ONCE = 1 << 16  # bytes; a reader that takes them slowly has no more time for all of them together
_request = threading.local()


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Everything that this thread sends and receives inside must be done before the time is over.

    Raises:
        httpx.TimeoutException: it is not.
    """
    before = getattr(_request, "deadline", None)
    _request.deadline = time.monotonic() + seconds
    try:
        yield
    finally:
        _request.deadline = before


def transport() -> httpx.HTTPTransport:
    """httpx's transport, over connections that keep to ``within``."""
    made = httpx.HTTPTransport(trust_env=False)
    # httpx takes no network backend; test_dripping_headers… fails should it name its pool otherwise.
    made._pool = httpcore.ConnectionPool(
        ssl_context=httpx.create_ssl_context(trust_env=False), max_connections=None, network_backend=_Backend()
    )
    return made


def _left(timeout: float | None, error: type[Exception]) -> float | None:
    """Seconds that one read or write may take."""
    deadline = getattr(_request, "deadline", None)
    if deadline is None:
        return timeout
    left = deadline - time.monotonic()
    if left <= 0:
        raise error("the whole request took too long")
    return left if timeout is None else min(left, timeout)


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream):
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), WRITTEN_AT_ONCE):
            part = buffer[start : start + WRITTEN_AT_ONCE]
            self._stream.write(part, _left(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None):
        left = _left(timeout, httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore.SyncBackend):
    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **options: Any):
        return _Stream(super().connect_tcp(host, port, _left(timeout, httpcore.ConnectTimeout), **options))
