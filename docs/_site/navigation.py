"""The side bar of the site, from the lists of the home page: a list of links is read on GitHub as well."""

from __future__ import annotations

import re

_SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"^- \[[^\]]+\]\(([\w/.-]+)\.md\)", re.MULTILINE)


def with_tables_of_contents(text: str) -> str:
    """Add to the home page what tells Sphinx which pages there are, in which order, under which heading."""
    sections = [(title, _LINK.findall(body)) for title, body in _SECTION.findall(text)]
    trees = [
        f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(pages) + "\n```"
        for title, pages in sections
        if pages
    ]
    return "\n\n".join([text.rstrip(), *trees, ""])
