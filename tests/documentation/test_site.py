"""The site is built by one command without a warning, and its pages ask no other host for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from tests.documentation.pages import DOCS, PAGES, ROOT

if TYPE_CHECKING:
    from pathlib import Path

_LOADS = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "srcset", "object": "data"}


class _Page(HTMLParser):
    """What a page loads, and where it links."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.anchors: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in _LOADS and (target := given.get(_LOADS[tag])):
            self.loads.append(target)
        if tag == "a" and (target := given.get("href")):
            self.anchors.append(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build it as CONTRIBUTING.md says, but to another place."""
    out = tmp_path_factory.mktemp("site")
    command = re.search(r"sphinx-build (.+) docs build/site", (ROOT / "CONTRIBUTING.md").read_text())
    assert command
    paths = [str(DOCS), str(out / "html"), "-d", str(out / "doctrees")]
    arguments = [sys.executable, "-m", "sphinx", *command[1].split(), *paths]
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "html"


def test_every_page_is_in_the_site(site: Path) -> None:
    """Of docs/, and in the side bar: a page that nobody finds is none."""
    pages = {page.stem for page in PAGES if page.parent == DOCS}
    assert pages <= {path.stem for path in site.glob("*.html")}
    linked = set(_Page(site / "index.html").anchors)
    assert {f"{page}.html" for page in pages - {"index"}} <= linked
    assert {f"generated/{name}.html" for name in ("api", "cli", "options", "schema")} <= linked


def test_nothing_is_asked_of_other_hosts(site: Path) -> None:
    """Fonts, scripts, styles and pictures lie beside the pages: it works offline and tells nobody who reads it."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for path in pages:
        loads = _Page(path).loads
        assert loads
        assert not [target for target in loads if re.match(r"(https?:)?//", target)], path
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_local_links_lead_somewhere(site: Path) -> None:
    """Sphinx checks those that it knows; pictures and files are looked for here."""
    followed = 0
    for path in site.rglob("*.html"):
        for target in _Page(path).loads + _Page(path).anchors:
            name = target.partition("#")[0].partition("?")[0]
            if name and not re.match(r"[a-z]+:", name):
                assert (path.parent / name).exists(), f"{path.name}: {target}"
                followed += 1
    assert followed > 500


def test_pictures_are_those_of_the_script(tmp_path: Path) -> None:
    """A picture is changed in the script that draws it."""
    committed = {path.name: path.read_bytes() for path in (DOCS / "pictures").glob("*.svg")}
    script = tmp_path / "draw.py"
    script.write_bytes((DOCS / "pictures" / "draw.py").read_bytes())
    subprocess.run([sys.executable, str(script)], check=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")} == committed
    shown = re.findall(r"!\[[^\]]+\]\(pictures/([\w-]+\.svg)\)", "".join(page.read_text() for page in PAGES))
    assert sorted(shown) == sorted(committed)
    assert len(committed) >= 4
