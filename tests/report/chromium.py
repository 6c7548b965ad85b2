"""A page in headless Chromium, driven as its own developer tools do: over two pipes, by JSON."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROGRAM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
          "--disable-background-networking", "--disable-component-update")  # fmt: skip


class Page:
    """One page: its scripts and messages, mouse and keyboard."""

    def __init__(self, write: Any, read: Any) -> None:
        self._write, self._read, self._number, self._session = write, read, 0, None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a method of the protocol; events meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> Any:
        text = bytearray()
        while (byte := self._read.read(1)) != b"\0":
            assert byte, "Chromium ended"
            text += byte
        return json.loads(text)

    def value(self, expression: str) -> Any:
        """The value of an expression of JavaScript; of a promise what it becomes."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Waits until an expression holds."""
        tick = f"""new Promise((done, fail) => {{
            const end = Date.now() + {1000 * seconds};
            (function look() {{
              if ({condition}) done(true);
              else if (Date.now() > end) fail(new Error("waited in vain"));
              else setTimeout(look, 20);
            }})(); }})"""
        self.value(tick)

    def open(self, path: Path) -> None:
        """Goes to a file."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def press(self, key: str) -> None:
        """Presses a key and lets it go; a single character is typed."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def click(self, selector: str) -> None:
        """Clicks the middle of an element."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{element}.scrollIntoView({{block: 'nearest'}})")
        box = f"{element}.getBoundingClientRect()"
        x, y = self.value(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=x,
                y=y,
                button="left",
                clickCount=1,
            )

    def complaints(self) -> list[str]:
        """Errors of scripts and what the page's own policy refused."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(e["params"]) for e in self.events if e.get("method") in kinds]


@contextlib.contextmanager
def opened(profile: Path) -> Iterator[Page]:
    """A page of a browser that ends with the block."""
    assert PROGRAM is not None
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()

    # The browser's ends are its files 3 and 4.
    wired = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{from_write}', "bash", PROGRAM, *_FLAGS]
    browser = subprocess.Popen(
        [*wired, f"--user-data-dir={profile}", "--remote-debugging-pipe"],
        pass_fds=(to_read, from_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(from_write)
    try:
        with os.fdopen(to_write, "wb") as write, os.fdopen(from_read, "rb") as read:
            yield Page(write, read)
    finally:
        browser.kill()
        browser.wait()
