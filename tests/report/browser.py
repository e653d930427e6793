"""Pages in the system's Chromium, opened from disk, without a network."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

_IN_CI = bool(os.environ.get("QSENS_CI"))
"""Asked while the environment is still that of the machine."""

# Chromium would look for updates, and has no sandbox where it is root
_ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a headless browser; without one the test is skipped, but in CI."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        (pytest.fail if _IN_CI else pytest.skip)("there is no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_ARGUMENTS))
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, page: Path, *, width: int = 1440, height: int = 900, dark: bool = False) -> Iterator[Page]:
    """Open a file; nothing may be told on the console, thrown, or asked for, by the time it is closed again."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", offline=True
    )
    told: list[str] = []
    asked: list[str] = []
    found = context.new_page()
    found.on("console", lambda message: told.append(f"{message.type}: {message.text}"))
    found.on("pageerror", lambda error: told.append(str(error)))
    found.on("request", lambda request: asked.append(request.url))
    found.goto(page.as_uri())
    found.wait_for_selector("html[data-ready]")
    yield found
    assert told == []
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    context.close()


def draw_all(page: Page) -> int:
    """Scroll to every chart, wait until it is drawn, and return how many there are."""
    charts = page.locator(".chart")
    for place in range(charts.count()):
        chart = charts.nth(place)
        chart.scroll_into_view_if_needed()
        chart.locator("canvas").wait_for()
    page.wait_for_function("document.querySelectorAll('.chart:not([data-drawn])').length === 0")
    return charts.count()


def column(page: Page, name: str) -> list[str]:
    """Texts of a column of the table, without the line of the whole model."""
    heads = page.locator("#ops th").all_inner_texts()
    place = next(index for index, head in enumerate(heads) if head.strip() == name)
    texts: Any = page.evaluate(
        "place => [...document.querySelectorAll('#ops tbody tr:not(.total)')].map(row => row.cells[place].textContent)",
        place,
    )
    return list(texts)
