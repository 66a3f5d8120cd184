"""A headless Chromium that opens a page, clicks and reads: spoken to over its debugging pipe, without a driver."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--window-size=1200,1000")


class Browser:
    """One page in a browser. The browser reads commands from its descriptor 3 and answers on 4, each ended by a zero.

    Args:
        page: HTML file to open.
        profile: empty folder for the browser's files.
    """

    def __init__(self, page: Path, profile: Path) -> None:
        ours, theirs = zip(os.pipe()[::-1], os.pipe(), strict=True)  # (write commands, read answers), the other ends
        moved = 'exec 3<&{} 4>&{}; exec "$@"'.format(*theirs)
        words = ["bash", "-c", moved, "browser", CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(words, pass_fds=theirs, stderr=subprocess.DEVNULL)
        for end in theirs:
            os.close(end)
        self._commands, self._answers = os.fdopen(ours[0], "wb"), os.fdopen(ours[1], "rb")
        self._number, self._session = 0, None
        self.complaints: list[str] = []  # of the page: refused by its policy, or thrown by its script
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._send(f"{domain}.enable")
        self._send("Page.navigate", url=page.as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._commands.close()
        self._answers.close()

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        return self._send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def click(self, selector: str) -> None:
        """Click with the mouse on the middle of the first element that the CSS selector names."""
        script = f"""(() => {{ const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "center"}});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; }})()"""
        x, y = self.evaluate(script)
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while (answer := self._read()).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (sign := self._answers.read(1)) != b"\0":
            if not sign:
                raise RuntimeError("the browser has ended")
            text += sign
        message = json.loads(text)
        if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
            self.complaints.append(json.dumps(message["params"]))
        return message
