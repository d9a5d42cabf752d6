"""A walk through the page in Debian's Firefox (WebDriver BiDi) and in WebKitGTK, which has Safari's engine (WebDriver). Each is skipped
where it is not installed: `apt-get install firefox-esr`, `apt-get install webkit2gtk-driver xvfb`.

The protocols are spoken here: Playwright wants patched browsers, or newer commands than Firefox ESR 153 has."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx2
import pytest
from websockets.sync.client import connect

FIREFOX = shutil.which("firefox-esr")
WEBKIT, SCREEN = shutil.which("WebKitWebDriver"), shutil.which("Xvfb")
MINI = max(Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"), default=None)  # WebKitGTK's own browser
# what the walk needs in the page
HELPERS = """
const $ = (what) => document.querySelector(what);
const until = async (what) => {
  for (let i = 0; i < 800; i++) { if (what()) return; await new Promise((go) => setTimeout(go, 25)); }
  throw new Error(`waited in vain for ${what}; ${$('#alert').textContent}`);
};
const put = (what, value) => { $(what).value = value; $(what).dispatchEvent(new InputEvent('input', { bubbles: true })); };
const run = async (tab, prompt, done) => {
  put(`#${tab} [name=prompt]`, prompt);
  $(`#${tab} [type=submit]`).click();
  await until(() => $(`#${tab} ${done}[data-state=done]`) && !$(`#${tab}`).ariaBusy);
};
"""


class Browser(Protocol):
    """One tab."""

    @property
    def wrong(self) -> list[str]:
        """Errors in the page, and what its content security policy blocked."""
        ...

    def open(self, url: str) -> None: ...

    def do(self, script: str) -> Any:
        """Runs the body of an async function in the page. Returns what JSON can say of what it gives."""
        ...

    def draw_line(self, *points: tuple[float, float]) -> None:
        """With the mouse, pressed."""
        ...


class Firefox:
    def __init__(self, line: Any) -> None:
        self.line, self.count = line, 0
        self.wrong: list[str] = []
        self.send("session.new", capabilities={})
        self.send("session.subscribe", events=["log.entryAdded"])
        self.tab = self.send("browsingContext.getTree")["contexts"][0]["context"]

    def send(self, method: str, **params: Any) -> Any:
        self.count += 1
        self.line.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            told = json.loads(self.line.recv(timeout=60))
            if told.get("method") == "log.entryAdded" and told["params"]["level"] == "error":
                self.wrong.append(told["params"]["text"])
            if told.get("id") == self.count:
                assert told["type"] == "success", told
                return told["result"]

    def open(self, url: str) -> None:
        self.send("browsingContext.navigate", context=self.tab, url=url, wait="complete")

    def do(self, script: str) -> Any:
        code = f"(async () => {{ {HELPERS} const give = async () => {{ {script} }}; return JSON.stringify((await give()) ?? null); }})()"
        told = self.send("script.evaluate", expression=code, target={"context": self.tab}, awaitPromise=True, userActivation=True)
        assert told["type"] == "success", told["exceptionDetails"]["text"]
        return json.loads(told["result"]["value"])

    def draw_line(self, *points: tuple[float, float]) -> None:
        self.send("input.performActions", context=self.tab, actions=pressed(points))


class WebKit:
    def __init__(self, server: httpx2.Client) -> None:
        self.server, self.session = server, ""
        options = {"binary": str(MINI), "args": ["--automation"]}
        told = self.send("POST", "", capabilities={"alwaysMatch": {"webkitgtk:browserOptions": options}})
        self.session = f"/{told['sessionId']}"

    def send(self, verb: str, path: str, **asked: Any) -> Any:
        told = self.server.request(verb, f"/session{self.session}{path}", json=asked if verb == "POST" else None).json()["value"]
        assert not (isinstance(told, dict) and "error" in told), told
        return told

    @property
    def wrong(self) -> list[str]:
        return self.do("return window.wrong")

    def open(self, url: str) -> None:
        self.send("POST", "/url", url=url)
        self.do("""if (!window.wrong) {
              window.wrong = [];
              addEventListener('error', (event) => wrong.push(event.message));
              addEventListener('unhandledrejection', (event) => wrong.push(String(event.reason)));
              addEventListener('securitypolicyviolation', (event) => wrong.push(event.blockedURI));
            }""")

    def do(self, script: str) -> Any:
        code = f"""const tell = arguments[0]; {HELPERS} const give = async () => {{ {script} }};
            give().then((found) => tell([found ?? null]), (error) => tell(String(error)));"""
        told = self.send("POST", "/execute/async", script=code, args=[])
        assert isinstance(told, list), told
        return told[0]

    def draw_line(self, *points: tuple[float, float]) -> None:
        self.send("POST", "/actions", actions=pressed(points))


def pressed(points: tuple[tuple[float, float], ...]) -> list[dict[str, Any]]:
    """A line as WebDriver's actions of a mouse."""
    moves: list[dict[str, Any]] = [{"type": "pointerMove", "x": round(x), "y": round(y)} for x, y in points]
    moves = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
    return [{"type": "pointer", "id": "mouse", "actions": moves}]


@contextmanager
def firefox(profile: Path) -> Iterator[Firefox]:
    assert FIREFOX is not None
    command = [FIREFOX, "--headless", "--no-remote", "--remote-debugging-port", "0", "--profile", str(profile)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            there = profile / "WebDriverBiDiServer.json"
            end = time.monotonic() + 60
            while not (there.exists() and there.read_text()):
                assert process.poll() is None and time.monotonic() < end, "Firefox did not say where it listens"
                time.sleep(0.05)
            server = json.loads(there.read_text())
            with connect(f"ws://{server['ws_host']}:{server['ws_port']}/session", max_size=None) as line:
                yield Firefox(line)
        finally:
            process.terminate()


@contextmanager
def webkit() -> Iterator[WebKit]:
    """On a screen of its own, which nobody sees."""
    assert WEBKIT is not None and SCREEN is not None
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    read, write = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen([SCREEN, "-displayfd", str(write), "-screen", "0", "1200x900x24"], pass_fds=[write], **quiet) as screen:
        try:
            os.close(write)
            with os.fdopen(read) as told:
                shown = {**os.environ, "DISPLAY": f":{told.readline().strip()}"}
            with subprocess.Popen([WEBKIT, f"--port={port}"], env=shown, **quiet) as driver:
                try:
                    transport = httpx2.HTTPTransport(retries=8)  # while it starts
                    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, transport=transport) as server:
                        browser = WebKit(server)
                        yield browser
                        browser.send("DELETE", "")
                finally:
                    driver.terminate()
        finally:
            screen.terminate()


@pytest.mark.skipif(FIREFOX is None, reason="Firefox is not installed: apt-get install firefox-esr")
def test_a_walk_through_all_tabs_in_firefox(address: str, tmp_path: Path) -> None:
    with firefox(tmp_path) as browser:
        walk(browser, address)


@pytest.mark.skipif(
    None in (WEBKIT, SCREEN, MINI), reason="WebKitGTK's driver or Xvfb is not installed: apt-get install webkit2gtk-driver xvfb"
)
def test_a_walk_through_all_tabs_in_webkit(address: str) -> None:
    with webkit() as browser:
        walk(browser, address)


def walk(browser: Browser, address: str) -> None:
    browser.open(f"{address}#draw")
    browser.do("await until(() => document.body.dataset.ready)")
    browser.do("put('#draw [name=steps]', 2); await run('draw', 'a red car', '.slot')")
    browser.do("[...document.querySelectorAll('#draw .slot button')].find((b) => b.textContent === 'Edit this').click()")
    box = browser.do("""await until(() => $('#edit canvas').width === 32); scrollTo(0, 0);
        const { x, y, width, height } = $('#edit canvas').getBoundingClientRect(); return [x, y, width, height];""")
    browser.draw_line(*((box[0] + box[2] * part, box[1] + box[3] * part) for part in (0.25, 0.3, 0.35)))
    painted = browser.do("""const { data } = $('#edit canvas').getContext('2d').getImageData(0, 0, 32, 32);
        return data.filter((value, i) => i % 4 === 3 && value).length;""")
    assert 20 < painted < 300
    browser.do("put('#edit [name=steps]', 2); await run('edit', 'make it blue', '.slot')")
    kept = browser.do("""
        const [after, before] = await Promise.all([...document.querySelectorAll('#edit .sides img')].map(async (image) => {
          const pen = new OffscreenCanvas(32, 32).getContext('2d');
          pen.drawImage(await createImageBitmap(image.blob), 0, 0);
          return pen.getImageData(0, 0, 32, 32).data;
        }));
        return [...before].map((value, i) => value === after[i]);""")
    assert all(kept[32 * 4 * 20 :]) and not all(kept), "what was painted has changed, and nothing below it"
    browser.open(f"{address}#ask")
    browser.do("await until(() => document.body.dataset.ready); put('#ask [name=max_tokens]', 3); await run('ask', 'what?', '.turn')")
    browser.do("""location.hash = 'compare'; put('#compare [name=prompt]', 'a red car'); $('#compare [type=submit]').click();
        await until(() => $('#compare .speed') && !$('#compare').ariaBusy)""")
    browser.do("""location.hash = 'live'; await until(() => $('#live [data-link]').textContent === 'connected');
        put('#live [name=prompt]', 'a red car'); await until(() => $('#live[data-tier=better]:not([aria-busy])'))""")
    browser.do("$('#live [data-use]').click(); await until(() => $('#edit .thumb') && !$('#edit').hidden)")
    assert browser.wrong == [], "errors in the page, or what its content security policy blocked"
