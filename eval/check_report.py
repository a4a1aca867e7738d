"""Open a report in a real headless browser and check what a reader would: nothing fails, everything works.

python eval/check_report.py runs/mine/report.html               # prints what was found; --shots DIR keeps the pictures
python eval/check_report.py REPORT --axe axe.min.js -o eval/results/check_report.json   # with axe-core's rules, too

Needs chromium or chrome on the PATH. At 390 and 1,280 pixels, light and dark: no console message, no request, every
image decodes, nothing is wider than the page, no chart scrolls sideways, the three answers stand above the fold; the
slider, the keys on the map, the choice of a size and the buttons do what they say; without scripts the grid is there.
"""

import argparse
import base64
import datetime
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from quantdm.errors import QuantDMError
from quantdm.files import write_json

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
VIEWS = [(width, height, theme) for width, height in ((390, 844), (1280, 900)) for theme in ("light", "dark")]
STATE = """(() => { const of = (s) => [...document.querySelectorAll(s)];
const answers = of('.answer'), below = (a) => a.getBoundingClientRect().bottom > innerHeight;
return { answers: answers.length, below_fold: answers.filter(below).length,
broken: of('img').filter((i) => !i.complete || !i.naturalWidth).length, images: of('img').length,
too_wide: document.documentElement.scrollWidth - innerWidth,
sideways: of('.chart').filter((c) => c.scrollWidth > c.clientWidth + 1).length, small_text: of('.answer p').filter(
(p) => parseFloat(getComputedStyle(p).fontSize) < 12).length }; })()"""
ACTIONS = {
    "slider": """(() => { const r = document.querySelector('.stage input'); if (!r) return 'none';
r.value = 20; r.dispatchEvent(new Event('input'));
return document.querySelector('.stage .over').style.clipPath; })()""",
    "flip": """(() => { const b = document.querySelector('.flip'); if (!b) return 'none';
b.click(); return document.querySelector('.stage input').value; })()""",
    "next": """(() => { const b = document.querySelector('.next'); if (!b) return 'none';
const before = document.querySelector('.seeds').textContent; b.click();
return before !== document.querySelector('.seeds').textContent; })()""",
    "size": """(() => { const r = document.querySelector('#size'); if (!r) return 'none';
r.value = r.max; r.dispatchEvent(new Event('input'));
return document.querySelector('.size.picked').dataset.size === r.max
&& /predicted/.test(document.querySelector('.says').textContent); })()""",
    "keys on the map": """(() => {
const m = [...document.querySelectorAll('svg.map')].find((each) => each.checkVisibility()); if (!m) return 'none';
m.focus(); m.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));
return document.querySelector('#tip.on')?.textContent ?? ''; })()""",
    "escape": """(() => { document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}));
return document.querySelector('#tip.on') === null; })()""",
    "copy": """(async () => { const b = document.querySelector('.copy'); if (!b) return 'none';
b.click(); await new Promise((r) => setTimeout(r, 300));
return document.querySelector('.buttons [aria-live]').textContent; })()""",
    "data": "JSON.parse(document.getElementById('data').textContent).version",
}


class Browser:
    """A headless browser, spoken to over its debugging pipe: JSON messages that end with a zero byte."""

    def __init__(self, name: str) -> None:
        read_commands, self._out = os.pipe()
        self._in, write_answers = os.pipe()
        self._profile = tempfile.mkdtemp()
        flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe"
        command = f"exec {name} {flags} --user-data-dir={self._profile} 3<&{read_commands} 4>&{write_answers}"
        pipes = (read_commands, write_answers)
        self._process = subprocess.Popen(["bash", "-c", command], pass_fds=pipes, stderr=subprocess.DEVNULL)
        for end in pipes:
            os.close(end)
        self._rest, self._number, self.events = b"", 0, []
        self.session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its answer; what happens meanwhile is kept in `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                if "error" in found:
                    raise QuantDMError(f"{method}: {found['error']['message']}")
                return found["result"]
            self.events.append(found)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._in, 1 << 20)
            if not part:
                raise QuantDMError("the browser ended; start it by hand to see why")
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def run(self, script: str) -> Any:
        """Return what a script of the page returns."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise QuantDMError(f"the page: {found['exceptionDetails'].get('text')} in {script[:60]!r}")
        return found["result"].get("value")

    def open(self, address: str, width: int, height: int, theme: str) -> None:
        """Open a page in a window of a size and theme, and wait until it is loaded."""
        phone = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.send("Emulation.setEmulatedMedia", media="screen", features=features)
        self.events.clear()
        self.send("Page.navigate", url=address)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._read())

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Write what the window shows, or the whole page, as PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(shot))

    def close(self) -> None:
        """End the browser."""
        self.session = None
        self.send("Browser.close")
        self._process.wait(timeout=20)
        shutil.rmtree(self._profile, ignore_errors=True)


def complaints(browser: Browser) -> list[str]:
    """Return what the console said and what was fetched, since the page was opened."""
    said = []
    for event in browser.events:
        method, found = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            said.append(f"exception: {found['exceptionDetails'].get('text')}")
        elif method == "Log.entryAdded":
            said.append(f"{found['entry']['level']}: {found['entry']['text']}")
        elif method == "Runtime.consoleAPICalled":
            said.append(f"console: {found['type']}")
        elif method == "Network.requestWillBeSent" and not found["request"]["url"].startswith(
            ("file:", "data:", "blob:")
        ):
            said.append(f"request: {found['request']['url'][:80]}")
    return said


def check(browser: Browser, page: Path, shots: Path | None, axe: Path | None) -> dict[str, Any]:
    """Return what was found in every view, after every action, and in print."""
    address, views = page.resolve().as_uri(), {}
    for width, height, theme in VIEWS:
        browser.open(address, width, height, theme)
        name = f"{width}-{theme}"
        if shots:
            browser.picture(shots / f"{name}.png")
            browser.picture(shots / f"{name}-whole.png", whole=True)
        views[name] = browser.run(STATE)
        if axe is not None:
            browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            browser.run(axe.read_text(encoding="utf-8") + "; 0")
            found = browser.run("axe.run().then((r) => r.violations.map((v) => v.id + ': ' + v.nodes.length))")
            views[name]["axe"] = found
        views[name]["actions"] = {what: browser.run(script) for what, script in ACTIONS.items()}
        views[name]["complaints"] = complaints(browser)
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(address, 1280, 900, "light")
    browser.send("Emulation.setScriptExecutionDisabled", value=False)
    shown = "[...document.querySelectorAll('.bands img')].filter((i) => i.getBoundingClientRect().height > 0).length"
    views["1280-light"]["grid_without_script"] = browser.run(shown)
    if shots:
        browser.send("Emulation.setEmulatedMedia", media="print", features=[])
        data = browser.send("Page.printToPDF", printBackground=False)["data"]
        (shots / "print.pdf").write_bytes(base64.b64decode(data))
    return views


def faults(views: dict[str, Any]) -> list[str]:
    """Return what is wrong, as sentences."""
    found = []
    for name, view in views.items():
        bad = {k: view[k] for k in ("broken", "small_text", "below_fold", "sideways") if view[k]}
        bad |= {"too_wide": view["too_wide"]} if view["too_wide"] > 0 else {}
        bad |= {"complaints": view["complaints"]} if view["complaints"] else {}
        bad |= {"axe": view["axe"]} if view.get("axe") else {}
        wrong = {k: v for k, v in view["actions"].items() if v is False or v == ""}
        found += [f"{name}: {key} {value}" for key, value in {**bad, **wrong}.items()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--shots", type=Path, help="directory for pictures and the print")
    parser.add_argument("--axe", type=Path, help="axe.min.js of axe-core")
    parser.add_argument("-o", "--out", type=Path, help="JSON record")
    arguments = parser.parse_args()
    name = next((found for b in BROWSERS if (found := shutil.which(b))), None)
    if name is None:
        raise SystemExit(f"no browser found, expected one of {', '.join(BROWSERS)} on the PATH")
    if arguments.shots:
        arguments.shots.mkdir(parents=True, exist_ok=True)
    browser = Browser(name)
    version = browser.send("Browser.getVersion")["product"]
    views = check(browser, arguments.page, arguments.shots, arguments.axe)
    browser.close()
    wrong = faults(views)
    for line in wrong or ["nothing wrong"]:
        print(line)
    if arguments.out:
        record = {"browser": version, "bytes": arguments.page.stat().st_size, "axe": arguments.axe is not None}
        record |= {"faults": wrong, "views": views, "date": datetime.date.today().isoformat()}
        write_json(arguments.out, record)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
