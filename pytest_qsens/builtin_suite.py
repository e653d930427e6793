"""The tests that ``--qsens-model`` runs where no test of the user's takes their place."""
# ruff: noqa: S101  # tests assert; not on the lines, which users see when one fails

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion

    from pytest_qsens.syrupy_extension import Score

pytestmark = pytest.mark.qsens


def test_op(qsens_score: Score, snapshot: SnapshotAssertion) -> None:
    """Quantizing this op does not hurt more than its snapshot says."""
    assert qsens_score == snapshot


def test_total(qsens_total: Score, snapshot: SnapshotAssertion) -> None:
    """Quantizing everything at once does not hurt more than its snapshot says."""
    assert qsens_total == snapshot
