"""How large the page of a report is, and how soon it can be used: 50, 500 and 5,000 ops in headless Chromium.

    python benchmarks/report.py

The picture of docs/report.md, from the root of the repository, as it shows paths, and with scores from the cache::

    pytest --qsens-model minilm --qsens-snapshot-dir fixtures/snapshots --qsens-report build/report
    python benchmarks/report.py --picture docs/report.png build/report/report.html

Times are from when the page is asked for, each the median of five visits: until the table can be sorted and filtered,
and until the charts in the first window are drawn.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pytest_qsens.gates import Gates
from pytest_qsens.report.directory.of_result import report_of
from pytest_qsens.report.directory.write import write_report
from tests.report.browser import chromium
from tests.report.hostile import large

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SIZES = (50, 500, 5000)
VISITS = 5
HEIGHT = 820
"""Of the picture, in pixels."""


def main() -> None:
    """Print the table, or draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    parser.add_argument("page", type=Path, nargs="?", metavar="report.html")
    arguments = parser.parse_args()
    with chromium() as browser:
        if arguments.picture is not None:
            draw(browser, arguments.page, arguments.picture)
            return
        print(f"{platform.machine()}, {platform.system()}, Chromium {browser.version}")
        print("| ops | page, MB | made in, s | table, ms | charts, ms | filtered in, ms |")
        print("|--:|--:|--:|--:|--:|--:|")
        for size in SIZES:
            print(measured(browser, size))


def measured(browser: Browser, size: int) -> str:
    """Line of the table for one number of ops."""
    with tempfile.TemporaryDirectory() as name:
        directory, result = Path(name), large(size)
        start = time.perf_counter()
        write_report(directory, report_of(result, None, Gates(())))
        made = time.perf_counter() - start
        page = directory / "report.html"
        visits = [visit(browser, page) for _ in range(VISITS)]
        middle = [statistics.median(times) for times in zip(*visits, strict=True)]
        numbers = " | ".join(f"{value:.0f}" for value in middle)
        return f"| {size} | {page.stat().st_size / 1e6:.2f} | {made:.1f} | {numbers} |"


def visit(browser: Browser, path: Path) -> tuple[float, float, float]:
    """Milliseconds until the table is there, until the charts are, and for a word to filter all ops."""
    context = browser.new_context(viewport={"width": 1440, "height": 2400}, offline=True)
    page = context.new_page()
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('[data-drawn]').length > 0")
    table = float(page.evaluate("document.documentElement.dataset.table"))
    charts = float(page.evaluate("performance.now()"))
    filtered: Any = page.evaluate(
        """() => {
          const start = performance.now(), words = document.getElementById("words");
          words.value = "q_proj";
          words.dispatchEvent(new Event("input", {bubbles: true}));
          document.body.offsetHeight;
          return performance.now() - start;
        }"""
    )
    context.close()
    return table, charts, float(filtered)


def draw(browser: Browser, path: Path, picture: Path) -> None:
    """Put the page on a wide light window and on a narrow dark one beside each other."""
    from PIL import Image

    wide = shot(browser, path, 1040, dark=False, targets=("body",))
    narrow = shot(browser, path, 390, dark=True, targets=("#heat",))
    height = HEIGHT
    canvas = Image.new("RGB", (sum(image.width for image in (*wide, *narrow)) + 12 * len(narrow), height), "#8a929b")
    left = 0
    for image in (*wide, *narrow):
        canvas.paste(image, (left, 0))
        left += image.width + 12
    canvas.save(picture, optimize=True)
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB, {canvas.width} x {canvas.height} pixels")


def shot(browser: Browser, path: Path, width: int, *, dark: bool, targets: tuple[str, ...]) -> list[Any]:
    """Take a picture of the window at each of these places."""
    from PIL import Image

    context = browser.new_context(
        viewport={"width": width, "height": HEIGHT}, color_scheme="dark" if dark else "light", offline=True
    )
    page = context.new_page()
    page.goto(path.resolve().as_uri())
    images = []
    for target in targets:
        scroll(page, target)
        page.wait_for_timeout(1500)  # charts are drawn as they come into the window, and move what follows
        scroll(page, target)
        page.wait_for_timeout(500)
        images.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
    context.close()
    return images


def scroll(page: Page, target: str) -> None:
    """Bring a place to the upper end of the window."""
    page.evaluate("target => document.querySelector(target).scrollIntoView({behavior: 'instant'})", target)


if __name__ == "__main__":
    main()
