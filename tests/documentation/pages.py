"""The pages with code blocks, and what is in them."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))  # what builds the site is no package

from _site import generated  # noqa: E402
from _site.blocks import MARKS, Block, blocks  # noqa: E402

__all__ = ["DOCS", "MARKS", "PAGES", "ROOT", "Block", "blocks_of", "every_block", "generated"]

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))


@cache
def blocks_of(page: Path) -> tuple[Block, ...]:
    """Blocks of one page, in order."""
    return tuple(blocks(page))


def every_block() -> tuple[Block, ...]:
    """Blocks of all pages."""
    return tuple(block for page in PAGES for block in blocks_of(page))
