"""The page of a report, in a real browser."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.diff import of_result
from pytest_qsens.report.directory.contents import Judgement, Report, compared, judged_by
from pytest_qsens.report.directory.page import as_script_data
from pytest_qsens.report.directory.write import write_report
from pytest_qsens.thresholds import parse_fail
from tests.report.browser import chromium, column, draw_all, opened
from tests.report.hostile import TEXTS, hostile, large, measured

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser

    from pytest_qsens.results import RunResult

FAIL = parse_fail("nmse:5%")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all pages."""
    with chromium() as found:
        yield found


def write(directory: Path, result: RunResult, old: RunResult | None = None) -> Path:
    """Write the report of a result, compared with an older one, and return the page."""
    changes, why = (None, "nothing") if old is None else compared(result, of_result(old, "old.json"), FAIL)
    report = Report(result, Judgement("open", ""), changes, why, FAIL)
    write_report(directory, replace(report, judgement=judged_by(report)))
    return directory / "report.html"


@pytest.fixture(scope="module")
def large_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Page of 5,000 ops: one op got worse, one better, one is new."""
    result = large(5000)
    old = list(result.ops)
    old[0] = measured(old[0].op, (old[0].isolated or {})["nmse"] / 2)  # type: ignore[operator] # it has one
    old[1] = measured(old[1].op, (old[1].isolated or {})["nmse"] * 2)  # type: ignore[operator] # as above
    return write(tmp_path_factory.mktemp("large"), result, replace(result, ops=tuple(old[:-1])))


def test_it_sorts_and_filters(browser: Browser, large_page: Path) -> None:
    """A click on a header sorts, another one turns the order; words and choices filter all ops, not those shown."""
    with opened(browser, large_page) as page:
        assert draw_all(page) == 2  # later, they would move what is clicked
        assert len(column(page, "op")) == 100
        assert page.locator("#count").inner_text() == "5,000 of 5,000 ops"
        nmse = [float(text.replace("\N{MINUS SIGN}", "-")) for text in column(page, "isolated NMSE")]
        assert nmse == sorted(nmse, reverse=True)
        page.get_by_role("button", name="isolated NMSE").click()
        found = [float(text.replace("\N{MINUS SIGN}", "-")) for text in column(page, "isolated NMSE")]
        assert found == sorted(found)
        assert max(found) < min(nmse)
        assert page.locator("#ops th[aria-sort=ascending]").inner_text() == "isolated NMSE"
        page.get_by_role("button", name="op", exact=True).click()
        assert column(page, "op")[:2] == ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj"]
        page.get_by_role("button", name="next").click()
        assert "101 to 200 of 5,000" in page.locator("#pages").inner_text()

        page.fill("#words", "LAYERS.13. q_proj")
        assert column(page, "op") == ["model.layers.13.self_attn.q_proj"]
        page.fill("#words", "layers.71.")
        assert page.locator("#count").inner_text() == "7 of 5,000 ops"
        assert len(column(page, "op")) == 7
        page.fill("#words", "")
        page.select_option("#by-change", "worse")
        assert column(page, "op") == ["model.layers.0.self_attn.q_proj"]
        assert column(page, "new / old") == ["\N{MULTIPLICATION SIGN}2.00"]
        page.select_option("#by-change", "new")
        assert len(column(page, "op")) == 1
        page.fill("#words", "nothing of that name")
        assert column(page, "op") == []
        assert page.locator("tr.total").count() == 1


def test_it_is_small(large_page: Path) -> None:
    """5,000 ops are less than 5 MB."""
    assert large_page.stat().st_size < 5_000_000


@pytest.mark.parametrize("width", [390, 1440])
def test_it_fits_and_follows_the_theme(browser: Browser, large_page: Path, width: int) -> None:
    """Nothing is wider than the window; the theme is the system's, and charts are drawn anew when it changes."""
    grounds = []
    for dark in (False, True):
        with opened(browser, large_page, width=width, height=844, dark=dark) as page:
            assert draw_all(page) == 2
            assert page.evaluate("document.documentElement.scrollWidth") == width
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            if not dark:
                light = page.locator(".chart canvas").first.evaluate("canvas => canvas.toDataURL()")
                page.emulate_media(color_scheme="dark")
                page.wait_for_function(
                    "before => document.querySelector('.chart canvas')?.toDataURL() !== before", arg=light
                )
                page.wait_for_timeout(300)  # the second chart
                assert page.evaluate("getComputedStyle(document.body).backgroundColor") not in grounds
    assert len(set(grounds)) == 2


@pytest.mark.parametrize("dark", [False, True])
def test_texts_stay_texts(browser: Browser, tmp_path: Path, *, dark: bool) -> None:
    """Whatever is in names, reasons, paths, data and the environment is shown as it is, and nothing of it runs."""
    old = hostile()
    ops = tuple(replace(op, isolated=op.isolated and {**op.isolated, "nmse": 1e-9}) for op in old.ops[:20])
    path = write(tmp_path, old, replace(old, ops=ops))
    html = path.read_bytes()
    for character in ("\u2028", "\u2029"):
        assert character.encode() not in html.split(b'<script type="application/json"', 1)[1]
    with opened(browser, path, width=390, dark=dark) as page:
        draw_all(page)
        assert page.evaluate("window.broken") is None
        assert page.evaluate("document.querySelectorAll('script').length") == 4
        assert page.evaluate("[...document.images].every(image => image.src.startsWith('data:image/png'))")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.fill("#words", "")
        shown = set(column(page, "op"))
        assert shown.issuperset(TEXTS)
        assert set(column(page, "scheme")).issuperset(TEXTS)
        samples = page.locator(".samples span").evaluate_all("found => found.map(each => each.textContent)")
        assert samples == list(TEXTS)
        facts = page.locator("#environment dd").evaluate_all("found => found.map(each => each.textContent)")
        assert set(facts).issuperset(TEXTS)
        page.get_by_role("button", name="op", exact=True).click()
        page.locator("#ops tbody tr").nth(3).hover()


def test_nothing_runs_that_is_not_ours(browser: Browser, tmp_path: Path) -> None:
    """If a text came through unescaped, the policy of the page would still stop it, and anything it asks for."""
    path = write(tmp_path, large(20))
    injected = (
        '<script>window.broken = 1</script><img src="https://example.com/x.png" onerror="window.broken = 2"></main>'
    )
    path.write_text(path.read_text().replace("</main>", injected, 1))
    context = browser.new_context()
    page = context.new_page()
    answered: list[str] = []
    page.on("response", lambda response: answered.append(response.url))
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate("window.broken") is None
    assert answered in ([], [path.as_uri()])
    assert sum("Content Security Policy" in text for text in refused) >= 3
    context.close()


def test_json_inside_of_a_script() -> None:
    """What could end the element or a string in it is written in another way, and reads the same."""
    import json

    written = as_script_data(list(TEXTS))
    assert not set(written) & set("<>&\u2028\u2029")
    assert json.loads(written) == list(TEXTS)
