"""A walk through the page in Debian's Firefox, over WebDriver BiDi. Skipped where there is none: `apt-get install firefox-esr`.

It speaks the protocol itself: Playwright wants a patched Firefox, or newer commands than Firefox ESR 153 has."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

FIREFOX = shutil.which("firefox-esr")
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


class Firefox:
    """One tab."""

    def __init__(self, line: Any) -> None:
        self.line, self.count, self.wrong = line, 0, []
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
        """Runs the body of an async function in the page, as if the user had clicked before. Returns what JSON can say of what it gives."""
        code = f"(async () => {{ {HELPERS} const give = async () => {{ {script} }}; return JSON.stringify((await give()) ?? null); }})()"
        told = self.send("script.evaluate", expression=code, target={"context": self.tab}, awaitPromise=True, userActivation=True)
        assert told["type"] == "success", told["exceptionDetails"]["text"]
        return json.loads(told["result"]["value"])

    def draw_line(self, *points: tuple[float, float]) -> None:
        """With the mouse, pressed."""
        moves: list[dict[str, Any]] = [{"type": "pointerMove", "x": round(x), "y": round(y)} for x, y in points]
        moves = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        self.send("input.performActions", context=self.tab, actions=[{"type": "pointer", "id": "mouse", "actions": moves}])


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


@pytest.mark.skipif(FIREFOX is None, reason="Firefox is not installed: apt-get install firefox-esr")
def test_a_walk_through_all_tabs(address: str, tmp_path: Path) -> None:
    with firefox(tmp_path) as browser:
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
        browser.do("""location.hash = 'live'; await until(() => $('#live [data-link]').textContent === 'connected');
            put('#live [name=prompt]', 'a red car'); await until(() => $('#live[data-tier=better]:not([aria-busy])'))""")
        browser.do("$('#live [data-use]').click(); await until(() => $('#edit .thumb') && !$('#edit').hidden)")
        assert browser.wrong == [], "errors in the page, or what its content security policy blocked"
