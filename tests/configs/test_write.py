"""What is written is read back as what it was written from, or is not written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qsens.configs import names
from pytest_qsens.configs.documents import parse_document
from pytest_qsens.configs.read import config_of
from pytest_qsens.configs.rules import CLASS_OF
from pytest_qsens.configs.simulated import EMBEDDING
from pytest_qsens.configs.write import TARGETS, write_config
from pytest_qsens.errors import QsensError
from pytest_qsens.ops import Op
from pytest_qsens.quant.op_scheme import OpScheme, parse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_qsens.configs.documents import Syntax


def said(text: str, ops: Sequence[Op], syntax: Syntax) -> Mapping[str, object]:
    """Op → scheme, of the text of a file whose format is found out."""
    config = config_of(parse_document(text, Path("written"), syntax))
    assert config.problems == ()
    return {op.name: config.decide(op).scheme for op in ops}


def scheme(name: str) -> OpScheme:
    """Scheme by its canonical name."""
    found = parse(name)
    assert found is not None
    return found


def test_targets_are_listed_once() -> None:
    """The command line takes the targets that there are."""
    assert tuple(TARGETS) == names.WRITTEN
