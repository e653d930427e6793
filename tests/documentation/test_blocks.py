"""Every code block of README and docs is run, read, or says why not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import yaml

from pytest_qsens.cli import main
from pytest_qsens.configs.read import read_config
from pytest_qsens.models.data import read_samples
from pytest_qsens.options import Options
from tests.documentation import world
from tests.documentation.pages import MARKS, PAGES, blocks_of, every_block

if TYPE_CHECKING:
    from pathlib import Path

    from tests.documentation.pages import Block

RUN = [page for page in PAGES if any(block.runs for block in blocks_of(page))]
SYNOPSES = [block for block in every_block() if "synopsis" in block.marks]

NOT_RUN = {
    "README.md": 4,  # three that set up environments, two of which CI runs as they stand there; a GitHub workflow
    "CONTRIBUTING.md": 2,  # the same; the site, which a test of its own builds
    "quickstart.md": 1,  # sets up an environment
    "ci.md": 9,  # workflows, clusters, other machines
    "models.md": 2,  # 7.5 GB
    "performance.md": 1,  # a formula
    "report.md": 1,  # steps of a workflow
    "scale.md": 3,  # 7.5 GB
}
"""Blocks that say why they are not run, by page: one more is a decision, not an accident."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the commands of all pages, of all workers: a model is measured once."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    return shared / "documentation-cache"


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what a page's directory starts as."""
    return world.build(tmp_path_factory.mktemp("documentation") / "project")


def test_blocks_are_found() -> None:
    """The tests below have something to do, and every mark is used: a parser that finds nothing passes nothing."""
    kinds = Counter(block.language for block in every_block())
    assert kinds["bash"] >= 30
    assert kinds["python"] >= 4
    assert kinds["yaml"] >= 4
    assert kinds["ini"] >= 2
    assert {mark for block in every_block() for mark in block.marks} == set(MARKS)


@pytest.mark.parametrize("block", every_block(), ids=lambda block: block.place)
def test_a_block_is_run_or_says_why_not(block: Block) -> None:
    """No block is left out by accident: its language is known, and what is not run has a reason."""
    if "not run" in block.marks:
        assert len(block.marks["not run"].split()) >= 2, f"{block.place}: say why"
    elif "output" not in block.marks:
        assert block.language in {"bash", "python", "yaml", "ini", "json"}, (
            f"{block.place}: a block of {block.language or 'unknown language'} is neither run nor read. Fence it with "
            "its language, or put a comment such as <!-- not run: REASON --> or <!-- output --> before it"
        )


def test_blocks_that_are_not_run_are_counted() -> None:
    """What is not run is known by number, so that it does not become more unnoticed."""
    found = Counter(block.page.name for block in every_block() if "not run" in block.marks)
    assert found == Counter(NOT_RUN)


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_a_page_runs(page: Path, project: Path, cache: Path, tmp_path: Path) -> None:
    """Its commands and Python do what the page says, from the first to the last, in one directory."""
    directory = tmp_path / "project"
    shutil.copytree(project, directory)
    environment = world.environment(cache)
    world.prepare(page.name, directory, environment)
    for block in blocks_of(page):
        if "file" in block.marks:
            (directory / block.marks["file"]).write_text(block.text)
        elif block.runs and block.language == "bash":
            run_shell(block, directory, environment)
        elif block.runs:
            run_python(block, directory, environment)


def run_shell(block: Block, directory: Path, environment: dict[str, str]) -> None:
    """Run the commands of a block one by one; what it shows as their output has to be in it."""
    commands = block.commands
    codes = [int(code) for code in block.marks.get("exit codes", "").split()] or [0] * len(commands)
    assert len(codes) == len(commands), f"{block.place}: {len(commands)} commands, {len(codes)} exit codes"
    for (command, shown), code in zip(commands, codes, strict=True):
        done = call(["bash", "-euo", "pipefail", "-c", command], block, directory, environment, code)
        printed = [" ".join(line.split()) for line in done.stdout.splitlines()]
        for line in shown:
            assert " ".join(line.split()) in printed, f"{block.place}: not printed: {line}\n{done.stdout}"


def run_python(block: Block, directory: Path, environment: dict[str, str]) -> None:
    """Run a block as a script, or as a test file: its scores are recorded, and then compared."""
    if not re.search(r"^def test_", block.text, re.MULTILINE):
        call([sys.executable, "-c", block.text], block, directory, environment)
        return
    (directory / "test_page.py").write_text(block.text)
    for arguments in (["--snapshot-update"], []):
        done = call(["pytest", "-q", "test_page.py", *arguments], block, directory, environment)
        assert re.search(r"\d passed", done.stdout), f"{block.place}: no test ran\n{done.stdout}"


def call(
    command: list[str], block: Block, directory: Path, environment: dict[str, str], code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a command that is to end with this exit code."""
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{block.place}: {command} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done


@pytest.mark.parametrize(
    "block", [block for block in every_block() if block.language == "ini"], ids=lambda block: block.place
)
def test_an_ini_file_is_understood(pytester: pytest.Pytester, block: Block) -> None:
    """Its keys are options, its values can be."""
    pytester.makeini(block.text)
    config = pytester.parseconfigure()
    Options.from_config(config)
    known = set(config._parser._inidict)
    assert set(re.findall(r"^(\w+) *=", block.text, re.MULTILINE)) <= known


@pytest.mark.parametrize(
    "block", [block for block in every_block() if block.language in ("yaml", "json")], ids=lambda block: block.place
)
def test_data_is_understood(block: Block, project: Path, tmp_path: Path) -> None:
    """Samples and configs are read by what reads them in a run; files of others are well-formed at least."""
    if "output" in block.marks:
        return
    if "file" in block.marks:  # of this or another tool, as its name says; later blocks of the page use it
        path = tmp_path / block.marks["file"]
        path.write_text(block.text)
        assert read_config(path).format if block.language == "yaml" else json.loads(block.text)
    elif block.language == "json":
        path = project / "sample.jsonl"
        path.write_text(block.text)
        assert read_samples(path, "--qsens-eval")
    elif "not run" in block.marks:
        assert yaml.safe_load(block.text)
    else:
        content = yaml.safe_load(block.text)
        if "schema" not in content:  # the parts of a scheme
            content = {"schema": 1, "rules": [{"ops": "*", "scheme": content}]}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        assert read_config(path).format == "qsens"


@pytest.mark.parametrize("block", SYNOPSES, ids=lambda block: block.place)
def test_a_synopsis_is_that_of_the_command(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """The options that a page lists are options of the command."""
    command = re.match(r"qsens (\w+)", block.text)
    assert command
    with pytest.raises(SystemExit):
        main([command[1], "--help"])
    options = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
    assert set(options.findall(block.text)) <= set(options.findall(capsys.readouterr().out))
