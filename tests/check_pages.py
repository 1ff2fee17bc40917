"""Open pages in a real browser (chromium, headless) and look for what makes them hard to read.

    python tests/check_pages.py out/grpo/report.html out/explain.html --out out/pages

Each page is opened 390 and 1400 pixels wide, light and dark, with every fold open. Problems are: the page
scrolls sideways, a text is smaller than 12 pixels or has a contrast below 4.5, an image has no alternative
text or is not enlarged by a whole number. The exit code is 1 if there are any. Screenshots, with the folds
closed, are left in --out.

This is not one of the default tests: it needs Debian's chromium (apt-get install chromium).
"""
import argparse
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

WIDTHS = (390, 1400)
MODES = {"light": 1, "dark": 0}              # chromium's numbers of the preferred colour scheme
SCRIPT = """<script>
const numbers = text => (text.match(/[\\d.]+/g) || []).map(Number);
function luminance(rgb) {
  const [r, g, b] = rgb.map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function background(node) {
  for (; node; node = node.parentElement) {
    const rgb = numbers(getComputedStyle(node).backgroundColor);
    if (rgb.length === 3 || rgb[3] > 0) return rgb.slice(0, 3);
  }
  return matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
}
addEventListener("load", () => {
  const found = [], page = document.documentElement;
  if (page.scrollWidth > innerWidth) found.push(`scrolls sideways: ${page.scrollWidth} pixels`);
  for (const image of document.querySelectorAll("img"))
    if (!image.alt) found.push(`an image without alt: ${image.outerHTML.slice(0, 60)}`);
    else if (image.naturalWidth < 96 && image.width % image.naturalWidth)
      found.push(`an image of ${image.naturalWidth} pixels is ${image.width} wide`);
  for (const image of document.querySelectorAll("svg"))
    if (!image.getAttribute("aria-label") && !image.getAttribute("aria-hidden"))
      found.push("an svg without label");
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), node = walker.currentNode.parentElement;
    if (!text || node.closest("script, style")) continue;
    const style = getComputedStyle(node), ink = numbers(node.closest("svg") ? style.fill : style.color);
    if (parseFloat(style.fontSize) < 12) found.push(`${style.fontSize} text: ${text.slice(0, 40)}`);
    const [a, b] = [luminance(ink), luminance(background(node))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) found.push(`contrast ${contrast.toFixed(2)}: ${text.slice(0, 40)}`);
  }
  parent.postMessage(JSON.stringify({found, height: page.scrollHeight}), "*");
});
</script>"""
# Chromium has no window of less than 500 pixels, so the page stands in a frame.
FRAME = """<!doctype html><body style="margin:0"><pre id="problems" hidden></pre><script>
addEventListener("message", event => document.getElementById("problems").textContent = event.data);
</script><iframe src="{page}" style="border:0;display:block;width:{width}px;height:{height}px"></iframe>"""


def chromium(page: Path, width: int, height: int, mode: int, *options: str) -> str:
    """Run the browser on a local page -> what it prints."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        sys.exit("error: no chromium on this machine (Debian: apt-get install chromium)")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={mode}", *options,
               page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check(page: Path, width: int, name: str, mode: int, out: Path) -> list[str]:
    """Measure one page at one width and mode, and take its picture -> its problems.

    The browser opens a copy beside the page, with folds open and a script that measures.
    """
    copy, frame = page.with_name(f"{page.stem}.check.html"), page.with_name(f"{page.stem}.frame.html")
    text = page.read_text(encoding="utf-8").replace('loading="lazy"', "")
    measured = []                                      # with the folds closed, and open
    try:
        for folds in ("<details>", "<details open>"):
            copy.write_text(text.replace("<details>", folds) + SCRIPT, encoding="utf-8")
            frame.write_text(FRAME.format(page=copy.name, width=width, height=1000))
            options = "--dump-dom", "--virtual-time-budget=9000"
            printed = chromium(frame, max(500, width), 1000, mode, *options)
            found = re.search('<pre id="problems" hidden="">(.+?)</pre>', printed, re.DOTALL)
            measured.append(json.loads(html.unescape(found[1])))
        copy.write_text(text, encoding="utf-8")
        height = min(16000, measured[0]["height"])
        frame.write_text(FRAME.format(page=copy.name, width=width, height=height))
        picture = out / f"{page.parent.name}-{page.stem}-{width}-{name}.png"
        chromium(frame, width, height, mode, f"--screenshot={picture}")
    finally:
        copy.unlink(missing_ok=True)
        frame.unlink(missing_ok=True)
    return measured[1]["found"]


def main() -> None:
    """Check all pages and say what was found."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE", help="HTML files")
    parser.add_argument("--out", type=Path, default=Path("out/pages"), help="screenshots [out/pages]")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    bad = 0
    for page in args.pages:
        for width in WIDTHS:
            for name, mode in MODES.items():
                problems = check(page, width, name, mode, args.out)
                bad += len(problems)
                print(f"{page}, {width} pixels, {name}: {len(problems) or 'no'} problems")
                for problem in dict.fromkeys(problems):
                    print(f"    {problem}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
