"""Chromium for tests, over its DevTools protocol: pages as people have them, by keyboard and at any size."""

import base64
import json
import os
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from tests.system.machine import within

_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-port=0"
).split()
_KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), "ArrowDown": (40, "")}


class Browser:
    """One tab. Commands are DevTools': https://chromedevtools.github.io/devtools-protocol/"""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._last = socket, 0
        self.violations: list[str] = []
        """What the page's own security policy forbade, and what a script threw."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> Any:
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": params}))
        while True:
            said = json.loads(self._socket.recv(timeout=60))
            if said.get("method") == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.violations.append(said["params"]["entry"]["text"])
            if said.get("method") == "Runtime.exceptionThrown":
                self.violations.append(json.dumps(said["params"]["exceptionDetails"]))
            if said.get("id") == self._last:
                assert "error" not in said, said
                return said["result"]

    def js(self, expression: str) -> Any:
        """The value of an expression in the page, awaited. Raises AssertionError for what it throws."""
        done = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def go(self, url: str, lands: str = "") -> None:
        """Load a page, which may lead elsewhere."""
        self("Page.navigate", url=url)
        self.at(lands or url)

    def at(self, url: str) -> None:
        """Wait until the tab is there (a prefix will do) and its page is whole."""
        self.sees(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def sees(self, expression: str) -> None:
        """Wait until an expression is true; while a page is replaced there is none."""

        def true() -> bool:
            try:
                return bool(self.js(expression))
            except AssertionError:
                return False

        try:
            within(30, true, expression)
        except AssertionError as err:
            page = self.js("`${location.href}\\n${document.body?.innerText}`")
            raise AssertionError(f"{err}; the page: {page[:2000]}") from err

    def press(self, *keys: str) -> None:
        for key in keys:
            code, text = _KEYS[key]
            about = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
            self("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        self("Input.insertText", text=text)

    def tab_to(self, what: str) -> None:
        """By the keyboard alone, from where the focus is to the next element that a selector fits."""
        for _ in range(80):
            self.press("Tab")
            if self.js(f"document.activeElement.matches({json.dumps(what)})"):
                return
        raise AssertionError(
            f"the keyboard does not lead to {what}: {self.js('document.body.innerHTML')[:3000]}"
        )

    def size(self, width: int, height: int) -> None:
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    """A Chromium with a profile of its own below `directory`."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        if os.environ.get("SF_TEST_STRICT") == "1":
            raise AssertionError("needs the package chromium")
        pytest.skip("needs the package chromium")
    profile = directory / "chromium"
    argv = [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(argv, start_new_session=True, **quiet)
    try:
        active = profile / "DevToolsActivePort"
        within(60, lambda: active.exists() and active.read_text().count("\n") >= 1, "chromium starts")
        port = active.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
            page = next(one for one in json.load(answer) if one["type"] == "page")
        with connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            yield Browser(socket)
    finally:
        os.killpg(
            process.pid, signal.SIGKILL
        )  # asked to end it may take a minute, and nothing of it is needed
        process.wait(30)
