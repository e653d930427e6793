"""Pages of the reference that are generated from the code each time the site is built."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest_qsens
from pytest_qsens.cli import main
from pytest_qsens.option_declarations import DECLARATIONS, MARKER_HELP

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(pytest_qsens.__file__).parent


def write(directory: Path) -> None:
    """Write all generated pages into ``directory``; those that would not change are left as they are."""
    directory.mkdir(exist_ok=True)
    for name, page in {"cli": cli(), "options": table(), "api": api(), "schema": schema()}.items():
        path = directory / f"{name}.md"
        text = "\n".join(page) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def commands() -> tuple[str, ...]:
    """Names of the subcommands of ``qsens``, nested ones with their parent."""
    found = []
    for name in _choices(_help()):
        nested = _choices(_help(name))
        found += [name, *(f"{name} {inner}" for inner in nested)]
    return tuple(found)


def cli() -> Iterator[str]:
    """Page of the console script: what ``--help`` prints, of every command."""
    yield "# The command line `qsens`"
    yield ""
    yield f"```text\n{_help()}```"
    for command in commands():
        yield f"\n## `qsens {command}`\n\n```text\n{_help(*command.split())}```"


def table() -> Iterator[str]:
    """Page of pytest's options, as they are registered; what they mean together is in docs/options.md."""
    yield "# Options of pytest"
    yield ""
    yield "As they are registered. [Options, markers, files, exit codes](../options.md) says how they work together."
    yield ""
    yield "| option | ini key | keyword of `@pytest.mark.qsens` | help |"
    yield "|---|---|---|---|"
    for declared in DECLARATIONS:
        flag = declared.flag if declared.metavar is None else f"{declared.flag} {declared.metavar}"
        marker = f"`{declared.name}`" if declared.marker else ""
        text = declared.help.replace("%%", "%").replace("|", "\\|").replace("*", "\\*")
        flag = flag.replace("|", "\\|")
        yield f"| `{flag}` | `{declared.key}` | {marker} | {text} |"


def api() -> Iterator[str]:
    """Page of the Python interface: what a factory returns, and what tests can take."""
    yield "# Python interface"
    yield ""
    yield "## What a model factory returns"
    for directive in ("autoclass:: pytest_qsens.ModelSpec", "autodata:: pytest_qsens.models.spec.Batch\n   :no-value:"):
        yield f"\n```{{eval-rst}}\n.. {directive}\n```"
    yield "\n## What is raised\n\n```{eval-rst}\n.. autoclass:: pytest_qsens.QsensError\n```"
    yield "\n## Fixtures\n"
    yield "| fixture | scope | what it is |\n|---|---|---|"
    for name, scope, text in fixtures():
        yield f"| `{name}` | {scope} | {text} |"
    yield "\n## The marker\n"
    yield f"`{MARKER_HELP.partition(':')[0]}`\n\n{MARKER_HELP.partition(': ')[2]}"
    yield "\n## What fixtures give"
    members = {
        "ops.Op": "members",
        "results.OpResult": "members",
        "syrupy_extension.Score": "",
        "quant.op_scheme.OpScheme": "members",
        "quant.op_scheme.WeightScheme": "members",
        "quant.op_scheme.ActivationScheme": "members",
    }
    for name, option in members.items():
        extra = "\n   :members:" if option else ""
        yield f"\n```{{eval-rst}}\n.. autoclass:: pytest_qsens.{name}{extra}\n```"


def fixtures() -> Iterator[tuple[str, str, str]]:
    """Name, scope and first sentence of every public fixture."""
    for node in ast.parse((PACKAGE / "fixtures.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            found = next((text for text in decorators if text.startswith("pytest.fixture")), None)
            if found and "name=" not in found:
                scope = re.search(r"scope='(\w+)'", found)
                text = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
                yield node.name, scope[1] if scope else "function", text.replace("``", "`")


def schema() -> Iterator[str]:
    """Page of the JSON schemas that the package has."""
    yield "# JSON schemas"
    for path in sorted(PACKAGE.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "$schema" in content:
            yield f"\n## {content['title']}\n"
            yield f"`pytest_qsens/{path.relative_to(PACKAGE).as_posix()}`. {content['description']}"
            yield f"\n```json\n{json.dumps(content, indent=2)}\n```"


def _help(*command: str) -> str:
    printed = io.StringIO()
    with (
        patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main([*command, "--help"])
    return printed.getvalue()


def _choices(text: str) -> list[str]:
    """Subcommands in the help of a parser that has some: its positional ``{a,b}``."""
    usage = re.sub(r"\[.*?\]", "", text.split("\n\n", maxsplit=1)[0], flags=re.DOTALL)
    found = re.search(r"\{([\w,\s-]+)\}\s+\.\.\.", usage)
    return [name.strip() for name in found[1].split(",")] if found else []
