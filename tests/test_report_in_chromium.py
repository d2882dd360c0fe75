"""The HTML report in a real browser: no console errors, nothing fetched, light and dark, and it is drawn.

Needs Chromium (Debian: apt-get install chromium). `AUTOPAR_SCREENSHOTS=docs` keeps the pictures.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_passes_report_html import with_timeline

from passes.plan import plots
from passes.plan.frontier import FrontierPoint
from passes.plan.report_html import plan_html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


def browse(page: Path, folder: Path, *flags: str) -> tuple[str, str]:
    """What the browser printed and logged after it had laid the page out."""
    log = folder / "net.json"
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000",
        "--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}",
        "--disable-background-networking", "--disable-component-update", "--no-first-run", *flags, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = with_timeline()
    found = tmp_path_factory.mktemp("page") / "report.html"
    points = [
        FrontierPoint("dp=2,tp=2", plan.step_time_s, plan.peak_memory_bytes, True, True),
        FrontierPoint("dp=4", plan.step_time_s * 2, plan.peak_memory_bytes // 2),
        FrontierPoint("tp=4", plan.step_time_s * 3, plan.peak_memory_bytes * 3, False),
    ]
    found.write_text(plan_html(plan, points), encoding="utf-8")
    return found


def pixels(png: Path) -> tuple[int, int, list[tuple[int, ...]]]:
    """Width, height and every 97th pixel of a picture, by the PNG format's own rules."""
    raw = png.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    place, data = 8, b""
    width = height = channels = 0
    while place < len(raw):
        (size,), kind = struct.unpack(">I", raw[place : place + 4]), raw[place + 4 : place + 8]
        body = raw[place + 8 : place + 8 + size]
        if kind == b"IHDR":
            width, height, depth, color = struct.unpack(">IIBB", body[:10])
            assert depth == 8
            channels = {2: 3, 6: 4}[color]
        if kind == b"IDAT":
            data += body
        place += 12 + size
    rows = zlib.decompress(data)
    stride = width * channels
    before = bytearray(stride)
    found = []
    for row in range(height):
        start = row * (stride + 1)
        method, line = rows[start], bytearray(rows[start + 1 : start + 1 + stride])
        for i in range(stride):
            left = line[i - channels] if i >= channels else 0
            up, corner = before[i], before[i - channels] if i >= channels else 0
            nearest = min((left, up, corner), key=lambda x: abs(left + up - corner - x))
            line[i] = (line[i] + (0, left, up, (left + up) // 2, nearest)[method]) & 255
        before = line
        found += [tuple(line[i : i + 3]) for i in range(0, stride, channels * 97)]
    return width, height, found


def test_it_renders_without_errors_and_fetches_nothing(page: Path, tmp_path: Path) -> None:
    shown, log = browse(page, tmp_path, "--dump-dom")
    assert "CONSOLE" not in log, log
    assert shown.count('class="plot"') >= 4 * plots.available()
    for section in (
        "decided",
        "time",
        "memory",
        "baselines",
        "frontier",
        "parameters",
        "collectives",
        "formulas",
        "open",
    ):
        assert f'<section id="{section}">' in shown
    events = json.loads((tmp_path / "net.json").read_text())["events"]
    asked = {event["params"]["url"] for event in events if "url" in event.get("params", {})}
    assert not [url for url in asked if re.match(r"https?://(?!.*(googleapis|gvt1|google)\.com)", url)]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_is_drawn_in_both_themes_on_a_laptops_screen(page: Path, tmp_path: Path, theme: str) -> None:
    picture = tmp_path / f"report-{theme}.png"
    flags = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    browse(page, tmp_path, f"--screenshot={picture}", "--window-size=640,800", *flags)
    width, height, seen = pixels(picture)
    assert (width, height) == (640, 800)
    common = Counter(seen)
    background = common.most_common(1)[0][0]
    assert (sum(background) > 3 * 200) == (theme == "light")
    assert len(common) > 10  # text, bars, lines
    if folder := os.environ.get("AUTOPAR_SCREENSHOTS"):
        shutil.copy(picture, folder)


def test_a_notebooks_cell_shows_it(page: Path, tmp_path: Path) -> None:
    notebook, picture = tmp_path / "notebook.html", tmp_path / "notebook.png"
    cell = f'<!doctype html><body style="margin:0">{with_timeline()._repr_html_()}</body>'
    notebook.write_text(cell, encoding="utf-8")
    drawn = []
    for each in (page, notebook):
        browse(each, tmp_path, f"--screenshot={picture}", "--window-size=640,640")
        drawn.append([color for color, _ in Counter(pixels(picture)[2]).most_common()])
    assert len(drawn[1]) > 10
    assert set(drawn[0][:5]) <= set(drawn[1][:12])  # the page's own colours, inside of the frame


# -- by keyboard -------------------------------------------------------------------------------------------------------


class Browser:
    """Chromium with a page open, told what to do over its debugging pipe: JSON messages that end in a zero byte."""

    def __init__(self, page: Path, folder: Path) -> None:
        theirs_in, self.to = os.pipe()
        self.back, theirs_out = os.pipe()
        flags = f"--headless --no-sandbox --disable-gpu --no-first-run --user-data-dir={folder / 'profile'}"
        shell = f"exec {CHROMIUM} {flags} --remote-debugging-pipe 3<&{theirs_in} 4>&{theirs_out}"
        self.process = subprocess.Popen(
            ["bash", "-c", shell], pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self.count, self.session, self.rest = 0, "", b""
        target = self.call("Target.createTarget", url=page.as_uri())["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        while self.js("document.readyState + (document.title ? '' : ', blank')") != "complete":
            time.sleep(0.05)

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """What the browser answers."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.back, 1 << 16)
            answer, _, self.rest = self.rest.partition(b"\0")
            found = json.loads(answer)
            if found.get("id") == self.count:
                assert "error" not in found, found
                return dict(found["result"])

    def js(self, expression: str) -> Any:
        """Its value in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key down and up."""
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            said = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **said)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)


ORDER = "[...document.querySelectorAll('a[href], summary, [tabindex]')].filter(e => e.checkVisibility()).length"
PLACE = (
    "[...document.querySelectorAll('a[href], summary, [tabindex]')].filter(e => e.checkVisibility())"
    ".indexOf(document.activeElement)"
)
OUTLINE = "(s => s.outlineStyle != 'none' && parseFloat(s.outlineWidth))(getComputedStyle(document.activeElement))"
OPEN = "document.activeElement.parentElement.open"


def test_everything_is_reached_and_opened_by_keyboard(page: Path, tmp_path: Path) -> None:
    browser = Browser(page, tmp_path)
    try:
        reached, opened = [], 0
        for _ in range(browser.js(ORDER)):
            browser.press("Tab", 9)
            reached.append(browser.js(PLACE))
            assert browser.js(OUTLINE) >= 2, browser.js("document.activeElement.outerHTML")
            if browser.js("document.activeElement.tagName") == "SUMMARY":
                before = browser.js(OPEN)
                browser.press("Enter", 13, "\r")
                assert browser.js(OPEN) != before
                browser.press(" ", 32, " ")
                assert browser.js(OPEN) == before
                opened += 1
        assert reached == sorted(reached) == list(range(len(reached)))  # as one reads, and nothing is left out
        assert len(reached) > 10
        assert opened >= 2
    finally:
        browser.close()
