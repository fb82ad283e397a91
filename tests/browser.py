"""A headless Chromium that opens pages and answers questions about them, over DevTools on two pipes.

Chromium reads commands on descriptor 3 and answers on 4, JSON with a zero byte after each. That needs no
package, and one process for all pages.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 60.0  # seconds for an answer: a machine with other work needs ten to start the browser
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe", "--hide-scrollbars"),
)


def program() -> str | None:
    """The browser that is installed."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Browser:
    """A browser with one tab.

    Attributes:
        heard: events of the tab since the last `open`, as (method, parameters).
    """

    def __init__(self, path: str, folder: Path) -> None:
        (its_in, self._out), (self._in, its_out) = os.pipe(), os.pipe()
        clear = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 10) for one in (its_in, its_out)]  # of 3 and 4
        places = [(os.POSIX_SPAWN_DUP2, one, number) for one, number in zip(clear, (3, 4), strict=True)]
        quiet = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
        arguments = [path, *OPTIONS, f"--user-data-dir={folder}"]
        self.process = os.posix_spawn(path, arguments, os.environ, file_actions=[*places, *quiet])
        for one in (its_in, its_out, *clear):
            os.close(one)
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self._number, self._rest, self._session = 0, b"", ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command and its answer; what else is heard meanwhile is kept."""
        self._number += 1
        number, command = self._number, {"id": self._number, "method": method, "params": parameters}
        told = json.dumps(command | ({"sessionId": self._session} if self._session else {}))
        with suppress(BrokenPipeError):  # reading tells that it has ended
            os.write(self._out, told.encode() + b"\0")
        answer = self._until(lambda said: said.get("id") == number, method)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, address: str, width: int, scheme: str, height: int = 900) -> None:
        """A page of this width in this colour scheme, loaded."""
        self.heard.clear()
        self.look(width, scheme, height)
        self.ask("Page.navigate", url=address)
        if not any(method == "Page.loadEventFired" for method, _ in self.heard):
            self._until(lambda said: said.get("method") == "Page.loadEventFired", "loading")

    def look(self, width: int, scheme: str, height: int = 900) -> None:
        """The same page in another width and colour scheme."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **screen)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def value(self, script: str) -> Any:
        """What a script on the page gives."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"])[:500])
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """The viewport as PNG."""
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        """End the process."""
        self._session = ""
        try:
            self.ask("Browser.close")
        except (OSError, RuntimeError):
            os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        for one in (self._in, self._out):
            os.close(one)

    def _until(self, wanted: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while True:
            message = self._next(deadline, what)
            if "method" in message:
                self.heard.append((message["method"], message["params"]))
            if wanted(message):
                return message

    def _next(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            read = os.read(self._in, 1 << 20) if ready else b""
            if not read:
                raise RuntimeError(f"{what}: the browser {'said nothing more' if ready else 'is silent'}")
            self._rest += read
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message
