"""Headless Chromium spoken to over its DevTools pipe, without any package: pages as a reader sees them."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
START_S, ANSWER_S = 60, 30


def find() -> str | None:
    """The program, or None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """A running browser with one page; ``events`` collects what it reports."""

    def __init__(self, process: subprocess.Popen, write: int, read: int):
        self.process, self.write, self.read = process, write, read
        self.buffer, self.number = b"", 0
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.session: str | None = None
        target = self.send("Target.createTarget", START_S, url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, patience: float = ANSWER_S, **parameters: Any) -> dict[str, Any]:
        """Result of one DevTools command; fails on its error and when no answer comes."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + patience
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            try:
                block = os.read(self.read, 1 << 16)
            except BlockingIOError:
                assert time.monotonic() < deadline, "chromium does not answer"
                time.sleep(0.01)
                continue
            assert block, f"chromium ended with {self.process.poll()}"
            self.buffer += block
        text, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(text)
        if "method" in message:
            self.events.append((message["method"], message.get("params", {})))
        return message

    def show(self, page: Path | str, width: int, dark: bool = False, height: int = 900) -> None:
        """Load a page, a file or an address, at a width in CSS pixels, and wait until it is drawn."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        self.events.clear()
        self.send("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        deadline = time.monotonic() + ANSWER_S
        while not any(name == "Page.loadEventFired" for name, _ in self.events):
            self._receive(deadline)

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression in the page, which itself runs none."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def complaints(self) -> list[str]:
        """What the browser's console shows: errors, warnings, refused content."""
        return [
            json.dumps(parameters)
            for name, parameters in self.events
            if name in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        ]

    def requests(self) -> list[str]:
        """Addresses that were asked for, the page's own included; embedded data has none."""
        found = [
            parameters["request"]["url"] for name, parameters in self.events if name == "Network.requestWillBeSent"
        ]
        return [url for url in found if not url.startswith("data:")]

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """The page as it prints on A4."""
        self.send("Emulation.clearDeviceMetricsOverride")
        self.send("Emulation.setEmulatedMedia", media="", features=[])
        return base64.b64decode(self.send("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])


@contextlib.contextmanager
def running(program: str, profile: Path) -> Iterator[Chromium]:
    """A browser whose profile lies in a folder of the test."""
    child_read, write = os.pipe()
    read, child_write = os.pipe()
    os.set_blocking(read, False)
    # --no-sandbox: Chromium refuses root otherwise; it shows nothing but files that the test has made
    options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking"
    command = [program, *options.split(), "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    script = f'exec "$@" 3<&{child_read} 4>&{child_write}'  # the pipe's ends are expected under these two numbers
    process = subprocess.Popen(
        ["bash", "-c", script, "chromium", *command],
        pass_fds=(child_read, child_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(child_read)
    os.close(child_write)
    try:
        yield Chromium(process, write, read)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(write)
        os.close(read)
