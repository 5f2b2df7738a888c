"""A headless Chromium, driven through its DevTools pipe: file descriptors, JSON between NUL bytes.

A Chromium is all this needs. `SMEARLENS_CHROMIUM` names one that is not on the path. Used by the
tests of the widgets and by the check of the built site; leaves out what either looks for.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from typing import Any

CANDIDATES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--hide-scrollbars", "--disable-background-networking", "--remote-debugging-pipe",
]  # fmt: skip
LAUNCH = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])"""
ANSWER_WITHIN = 60  # seconds

DRAWN = """(until => new Promise(done => (function wait() {
  const ours = [...document.querySelectorAll('.smearlens')];
  const theirs = [...document.querySelectorAll('[id^=sl-]')];
  if (document.readyState == 'complete' && ours.every(w => w.querySelector('sl-say')?.textContent)
      && theirs.every(w => w.children.length) || performance.now() > until)
    requestAnimationFrame(() => setTimeout(done));
  else setTimeout(wait, 2);
})()))(performance.now() + %d)"""
INKED = """[...document.querySelectorAll("canvas")].filter(c => c.offsetWidth).map(c => {
  const copy = Object.assign(document.createElement("canvas"), {width: c.width, height: c.height});
  const g = copy.getContext("2d", {willReadFrequently: true});
  g.drawImage(c, 0, 0);
  return new Set(new Uint32Array(g.getImageData(0, 0, c.width, c.height).data.buffer)).size;
})"""  # colours in each canvas that takes room


class BrowserError(Exception):
    """The browser refused a command, raised in the page, or went away."""


def find_browser() -> str | None:
    """The program to run, or `None`."""
    named = os.environ.get("SMEARLENS_CHROMIUM")
    return named or next(filter(None, map(shutil.which, CANDIDATES)), None)


class Browser:
    """A Chromium process and the messages to and from it."""

    def __init__(self, program: str):
        self.folder = tempfile.mkdtemp()
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (commands, answers)]
        launch = [sys.executable, "-c", LAUNCH, *map(str, theirs), program, *FLAGS]
        self.process = subprocess.Popen(
            [*launch, f"--user-data-dir={self.folder}", "about:blank"],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (commands, answers, *theirs):
            os.close(fd)
        self.buffer, self.events, self.count = b"", [], 0

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, method: str, session: dict | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come before it are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params, **(session or {})}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            self.events.append(answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        return answer["result"]

    def receive(self) -> dict[str, Any]:
        """The next message, an answer or an event."""
        while b"\0" not in self.buffer:
            if not select.select([self.answers], [], [], ANSWER_WITHIN)[0]:
                raise BrowserError(f"no answer within {ANSWER_WITHIN} s")
            data = os.read(self.answers, 1 << 20)
            if not data:
                raise BrowserError("the browser has ended")
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def close(self) -> None:
        """End the process and remove its profile."""
        self.process.terminate()
        self.process.wait(20)
        os.close(self.commands)
        os.close(self.answers)
        shutil.rmtree(self.folder, ignore_errors=True)


class Page:
    """One tab."""

    def __init__(self, browser: Browser, width: int = 800, height: int = 900):
        self.browser, self.height = browser, height
        self.target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        found = browser.send("Target.attachToTarget", targetId=self.target, flatten=True)
        self.session = {"sessionId": found["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.do(f"{domain}.enable")
        self.do("Performance.enable", timeDomain="threadTicks")
        self.resize(width)

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to this tab."""
        return self.browser.send(method, self.session, **params)

    def resize(self, width: int) -> None:
        """Change the width, in CSS pixels."""
        size = {"width": width, "height": self.height, "deviceScaleFactor": 1, "mobile": False}
        self.do("Emulation.setDeviceMetricsOverride", **size)

    def theme(self, name: str) -> None:
        """`"light"` or `"dark"`, as the system would say it."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.do("Emulation.setEmulatedMedia", features=features)

    def js(self, code: str) -> Any:
        """The value of an expression, awaited."""
        answer = self.do("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise BrowserError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def open(self, url: str, limit: float = ANSWER_WITHIN / 2) -> float:
        """Go to a page and wait until its widgets are drawn, or for `limit` seconds.

        Returns:
            the seconds of processor time that the tab has spent; not seconds of the clock, which
            tell how busy the machine is with other things
        """
        self.do("Page.navigate", url=url)
        self.drawn(limit)
        metrics = self.do("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def drawn(self, limit: float = ANSWER_WITHIN / 2) -> None:
        """Wait until all widgets are drawn, or for `limit` seconds."""
        self.js(DRAWN % (1000 * limit))

    def settle(self) -> None:
        """Wait for two frames."""
        self.js("new Promise(f => requestAnimationFrame(() => requestAnimationFrame(f)))")

    def shot(self, **options: Any) -> bytes:
        """What is seen, as a PNG (or as the options of `Page.captureScreenshot` say)."""
        return base64.b64decode(self.do("Page.captureScreenshot", **options)["data"])

    def events(self, *methods: str) -> list[dict[str, Any]]:
        """Parameters of the events of this tab so far."""
        session = self.session["sessionId"]
        mine = [e for e in self.browser.events if e.get("sessionId") == session]
        return [e["params"] for e in mine if e["method"] in methods]

    def messages(self) -> list[dict[str, Any]]:
        """Console messages, log entries and exceptions."""
        return self.events("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")

    def requests(self) -> list[str]:
        """Addresses asked for, but for `data:` and `blob:`."""
        urls = [e["request"]["url"] for e in self.events("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]

    def close(self) -> None:
        """Close the tab and forget its events."""
        self.browser.send("Target.closeTarget", targetId=self.target)
        session = self.session["sessionId"]
        self.browser.events = [e for e in self.browser.events if e.get("sessionId") != session]
