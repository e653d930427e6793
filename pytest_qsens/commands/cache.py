"""The command ``qsens cache``: list or clear what earlier runs have kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.cache import clear, default_cache_dir, entries
from pytest_qsens.errors import QsensError
from pytest_qsens.report.cached import listing, summary
from pytest_qsens.report.columns import aligned

if TYPE_CHECKING:
    from argparse import Namespace

    from pytest_qsens.commands.command import Subparsers


def register(commands: Subparsers) -> None:
    """Declare the command."""
    command = commands.add_parser("cache", help="list or clear what earlier runs have kept")
    actions = command.add_subparsers(required=True)
    for name, run, about in (
        ("list", list_entries, "print what is kept, the most recently used first"),
        ("clear", clear_entries, "remove what is kept; it is measured again when it is needed"),
    ):
        action = actions.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        action.add_argument("--cache", type=Path, metavar="DIR", help="as given to pytest in --qsens-cache")
        action.set_defaults(run=run)
    action.add_argument("--model", metavar="LABEL", help="only of this model, by the name in `qsens cache list`")


def _cache_dir(arguments: Namespace) -> Path:
    cache_dir: Path = arguments.cache or default_cache_dir()
    if cache_dir.exists() and not cache_dir.is_dir():
        raise QsensError(f"{cache_dir} is not a directory. Give the one that --qsens-cache names.")
    return cache_dir


def list_entries(arguments: Namespace) -> list[str]:
    """Run ``qsens cache list``; returns the lines to print."""
    cache_dir = _cache_dir(arguments)
    found = entries(cache_dir)
    table = aligned(listing(found)) if found else ()
    return [*table, summary(cache_dir, found)]


def clear_entries(arguments: Namespace) -> list[str]:
    """Run ``qsens cache clear``; returns the lines to print."""
    cache_dir, model = _cache_dir(arguments), arguments.model
    known = sorted({entry.model for entry in entries(cache_dir)})
    if model is not None and model not in known:
        raise QsensError(f"nothing of a model {model!r} in {cache_dir}. There is: {', '.join(known) or 'nothing'}.")
    return [f"removed from {summary(cache_dir, clear(cache_dir, model))}"]
