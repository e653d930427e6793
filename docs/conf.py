"""The site: ``sphinx-build -W --keep-going docs build/site``. Nothing is fetched while it is built or read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))

from importlib.metadata import version as version_of

from _site import blocks, generated, navigation

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx

project = "pytest-qsens"
version = release = version_of("pytest-qsens")
copyright = "the authors of pytest-qsens"  # noqa: A001 - Sphinx asks for this name
html_title = "pytest-qsens"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_site"]
nitpicky = False  # signatures name torch's types, whose pages are elsewhere

myst_heading_anchors = 4  # as GitHub: a page's links to headings work in both places
myst_enable_extensions = ["html_image"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"  # system fonts and scripts of its own: pages ask no other host
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go, .c1"
copybutton_prompt_text = "$ "


def _name_languages(_: Sphinx, tree: nodes.document) -> None:
    """Give indented blocks the language that `blocks` reads them as, which Markdown has no place for."""
    from docutils import nodes

    for block in tree.findall(nodes.literal_block):
        if block.get("language", "none") in ("none", "default"):
            block["language"] = blocks.language_of(block.astext()) or "none"


def _add_navigation(_: Sphinx, page: str, source: list[str]) -> None:
    if page == "index":
        source[0] = navigation.with_tables_of_contents(source[0])


def setup(app: Sphinx) -> None:
    """Write what is generated from the code before pages are read."""
    app.connect("builder-inited", lambda app: generated.write(Path(app.srcdir) / "generated"))
    app.connect("source-read", _add_navigation)
    app.connect("doctree-read", _name_languages)
