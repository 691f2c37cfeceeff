"""A page in a real browser: what headless Chromium draws of it, says about it and asks for."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
# No name can be looked up: what Chromium asks its makers for on its own goes nowhere.
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000",
)  # fmt: skip
PROBE = """<script>
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const drawn = text => { canvas.clearRect(0, 0, 60, 60); canvas.font = "32px " + getComputedStyle(document.body).fontFamily;
  canvas.fillText(text, 5, 40); return canvas.getImageData(0, 0, 60, 60).data.join(); };
const size = element => { const box = element.getBoundingClientRect(); return [box.width, box.height]; };
const theme = document.body.appendChild(Object.assign(document.createElement("i"), {style: "background: Canvas; color: CanvasText"}));
const told = {
  width: innerWidth, page: document.documentElement.scrollWidth,
  ids: [...document.querySelectorAll("[id]")].map(e => e.id),
  plots: [...document.querySelectorAll("svg")].map(svg => ({size: size(svg), title: svg.querySelector("title").textContent,
    told: svg.querySelector("desc").textContent,
    named: svg.getAttribute("aria-labelledby").split(" ").every(id => document.getElementById(id)),
    marks: [...svg.querySelectorAll("use")].filter(use => Math.max(...size(use)) > 0).length,
    words: [...svg.querySelectorAll("text")].map(text => [text.textContent, getComputedStyle(text).fill, ...size(text)]),
    lines: [...svg.querySelectorAll("path")].map(path => getComputedStyle(path).stroke)})),
  background: getComputedStyle(theme).backgroundColor, ink: getComputedStyle(theme).color,
  glyphs: Object.fromEntries([..."əƏğĞıIiİşŞçÇöÖüÜ\\u0378"].map(letter => [letter, drawn(letter)])),
};
parent.postMessage(JSON.stringify(told), "*");
</script>"""
FRAME = '<iframe src="{}" style="width: {}px; height: 900px; border: 0"></iframe>'
FRAMES = """<!doctype html><body>{}<pre id="probe"></pre><script>
const frames = [...document.querySelectorAll("iframe")].map(frame => frame.contentWindow), told = frames.map(() => null);
onmessage = event => { told[frames.indexOf(event.source)] = JSON.parse(event.data);
  document.getElementById("probe").textContent = JSON.stringify(told); };
</script></body>"""


@dataclass(frozen=True)
class Seen:
    """A page as the browser had it: the document, its console's lines, and the addresses that the page asked for."""

    document: str
    console: list[str]
    asked: list[str]


def see(page: Path, folder: Path, width: int = 1280) -> Seen:
    """Open a page. `folder` is for what the browser writes."""
    assert CHROMIUM is not None
    log = folder / "net.json"
    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--enable-logging=stderr", "--v=0"]
    done = subprocess.run(
        [*command, f"--log-net-log={log}", "--dump-dom", page.resolve().as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    begun = [event["params"] for event in events if "initiator" in event.get("params", {})]
    return Seen(
        done.stdout,
        [line for line in done.stderr.splitlines() if "CONSOLE" in line],
        [params["url"] for params in begun if params["initiator"] != "not an origin"],  # those are the browser's own
    )


def probe(page: Path, folder: Path, *looks: tuple[str, int]) -> list[dict[str, Any]]:
    """What a script finds in copies of a page that let it run, each in a theme and in a frame so wide: no window is narrower than 500 pixels."""
    text = page.read_text(encoding="utf-8").replace('http-equiv="Content-Security-Policy"', "").replace("</body>", PROBE + "</body>")
    frames = ""
    for theme, width in looks:
        copy = folder / f"{theme}-{width}.html"
        copy.write_text(text.replace("color-scheme: light dark;", f"color-scheme: {theme};"), encoding="utf-8")
        frames += FRAME.format(copy.name, width)
    frame = folder / "frames.html"
    frame.write_text(FRAMES.replace("{}", frames), encoding="utf-8")
    document = see(frame, folder).document
    told: list[dict[str, Any]] = json.loads(html.unescape(document.split('<pre id="probe">')[1].split("</pre>")[0]))
    return told


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours as CSS computes them, "rgb(r, g, b)"."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour[colour.index("(") + 1 :].rstrip(")").split(",")[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
