"""What the reference says by hand is all that there is in the code."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, get_args

from pytest_qsens.option_declarations import DECLARATIONS
from pytest_qsens.results import Status
from tests.documentation.pages import DOCS, PAGES, generated

if TYPE_CHECKING:
    import pytest

OPTIONS = (DOCS / "options.md").read_text()


def test_every_option_is_explained(pytester: pytest.Pytester) -> None:
    """docs/options.md has every option and every key of the ini file; no page has an option that there is not."""
    parser = pytester.parseconfig()._parser
    flags = set(re.findall(r"--qsens-[a-z-]+", parser.optparser.format_help()))
    assert {declared.flag for declared in DECLARATIONS} == flags
    assert flags <= set(re.findall(r"--qsens-[a-z-]*[a-z]", OPTIONS))
    twins = {declared.key for declared in DECLARATIONS}
    for key in {key for key in parser._inidict if key.startswith("qsens_")} - twins:
        assert re.search(rf"\b{key}( =|`)", OPTIONS), key
    for page in PAGES:
        assert set(re.findall(r"--qsens-[a-z-]*[a-z](?![a-z-])", page.read_text())) <= flags, page.name


def test_the_markers_keywords_are_told() -> None:
    """docs/options.md lists every keyword of ``@pytest.mark.qsens``."""
    sentence = re.search(r"The marker takes ([^.]+)\.", OPTIONS)
    assert sentence
    told = set(re.findall(r"\w+", sentence[1])) - {"and"}
    assert told == {declared.name for declared in DECLARATIONS if declared.marker}


def test_generated_pages_have_what_there_is() -> None:
    """Every option, command and fixture is in the generated reference."""
    table = "\n".join(generated.table())
    assert all(f"`{declared.key}`" in table for declared in DECLARATIONS)
    commands = generated.commands()
    assert {"show", "plan", "cache list"} <= set(commands)
    page = "\n".join(generated.cli())
    assert all(f"usage: qsens {command}" in page for command in commands)
    assert {name for name, _, _ in generated.fixtures()} == {"qsens_model", "qsens_op", "qsens_score", "qsens_total"}
    assert '"rules"' in "\n".join(generated.schema())


def test_every_status_is_explained() -> None:
    """docs/measurement.md names every status that an op can have."""
    page = (DOCS / "measurement.md").read_text() + OPTIONS
    assert len(get_args(Status)) >= 5
    assert all(f"`{status}`" in page for status in get_args(Status))
