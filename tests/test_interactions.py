"""What isolated errors and their interactions say of many ops at once, as values."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pytest_qsens import QsensError
from pytest_qsens.interactions import DIMENSIONS, decode, encode, matrix, predict, relative_error, with_prediction
from pytest_qsens.ops import TOTAL
from pytest_qsens.result_files import load, write
from pytest_qsens.result_payloads import from_payload, to_payload
from pytest_qsens.results import Cost, Interactions, OpResult, RunInfo, RunResult

if TYPE_CHECKING:
    from pathlib import Path

VECTORS = arrays.arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e3, 1e3, width=32))
"""Sketches."""


def measured(name: str, change: np.ndarray) -> OpResult:
    """Make an op that changes the output so; squares are the NMSE."""
    scores: dict[str, float | None] = {"nmse": float(change @ change)}
    return OpResult(name, "linear", name, "measured", None, scores, sketch=encode(change))


def total(nmse: float) -> OpResult:
    """Make the whole model's result."""
    return OpResult(TOTAL, TOTAL, "", "measured", None, {"nmse": nmse})


@given(VECTORS)
def test_text_and_back(vector: np.ndarray) -> None:
    """Not a bit is lost, in the text and in what travels between processes."""
    assert decode(encode(vector), "here").astype(np.float32).tobytes() == vector.tobytes()
    result = OpResult("a", "linear", "", "measured", None, {"nmse": 1.0}, sketch=encode(vector), weights=3)
    assert from_payload(to_payload(result)) == result


@pytest.mark.parametrize(
    "text",
    [
        "",
        "?",
        "AAAA",
        "AAAAAA",
        encode(np.array([1.0, np.nan])),
        encode(np.array([np.inf])),
        base64.b64encode(bytes(4 * DIMENSIONS + 4)).decode(),
    ],
)
def test_no_sketch(text: str) -> None:
    """Refused with the place and what to do."""
    with pytest.raises(QsensError, match=r"^r\.json, op 'a', 'sketch': .*--qsens-interactions$"):
        decode(text, "r.json, op 'a'")


@given(arrays.arrays(np.float64, st.tuples(st.integers(1, 6), st.just(5)), elements=st.floats(-10, 10, width=32)))
def test_the_prediction(changes: np.ndarray) -> None:
    """Changes add up before they are squared; ops that are left out by the model change nothing."""
    ops = [measured(str(i), change) for i, change in enumerate(changes)]
    without = OpResult("spare", "linear", "", "unexercised", "never reached")
    found = predict([*ops, without])
    assert found is not None
    assert found.additive == pytest.approx(float((changes**2).sum()), rel=1e-6, abs=1e-9)
    assert found.quadratic == pytest.approx(float((changes.sum(0) ** 2).sum()), rel=1e-5, abs=1e-4)
    whole = with_prediction(total(7.0), ops)
    assert whole is not None
    assert whole.isolated == {"nmse": 7.0, "additive": found.additive, "quadratic": found.quadratic}


def test_what_a_config_leaves_out_is_no_part_of_it() -> None:
    """Neither what it leaves unquantized, nor what was measured of quantizing that, too, is in the whole model."""
    ops = [measured("a", np.array([1.0, 0.0])), measured("b", np.array([1.0, 1.0]))]
    left = OpResult("c", "linear", "", "unquantized", "the config leaves it unquantized", scheme="unquantized")
    added = replace(measured("d", np.array([9.0, 9.0])), scheme="unquantized, added as w8a8")
    found = predict([replace(ops[0], scheme="w8a8"), left, replace(ops[1], scheme="w4a16"), added])
    assert found == predict(ops)
    assert found is not None
    assert found.additive == 3.0


def test_no_prediction_of_a_part() -> None:
    """Where one op is not known, nothing is said of all; sketches of two outputs are refused."""
    one, other = measured("a", np.ones(3)), measured("b", np.ones(3))
    for unknown in (
        replace(other, sketch=None),
        replace(other, status="failed", isolated=None, sketch=None),
        OpResult("b", "linear", "", "unrun", "not run"),
    ):
        assert predict([one, unknown]) is None
        assert with_prediction(total(7.0), [one, unknown]) == total(7.0)
    assert predict([]) is None
    assert with_prediction(None, [one, other]) is None
    with pytest.raises(QsensError, match="different lengths"):
        predict([one, measured("b", np.ones(4))])


def test_the_exact_length_of_an_error_counts() -> None:
    """A sketch only says how ops meet: what each does alone was measured."""
    ops = [replace(measured(n, np.array([1.0, 1.0])), isolated={"nmse": 5.0}) for n in "ab"]
    found = predict(ops)
    assert found is not None
    assert found == (10.0, pytest.approx(10.0 + 2 * 2.0))


def test_short_sketches_are_exact() -> None:
    """The error that is told is that of sketches, and none for the changes themselves."""
    assert relative_error(DIMENSIONS - 1) == 0
    assert relative_error(DIMENSIONS) == pytest.approx(1 / 32)


def test_the_matrix_of_a_result(tmp_path: Path) -> None:
    """Errors on the diagonal, products beside it; what was not measured has no row. A broken one is refused."""
    changes = {"a": (3.0, 0.0), "b": (-1.0, 1.0), "c": (0.5, 2.0)}
    ops = [measured(name, np.array(change)) for name, change in changes.items()]
    ops.append(replace(ops[0], op="d", status="failed", isolated=None, sketch=None))
    found = matrix(ops)
    assert found == Interactions(("a", "b", "c"), ((9.0, -3.0, 1.5), (-3.0, 2.0, 1.5), (1.5, 1.5, 4.25)))
    assert matrix(ops[3:]) is None
    info = RunInfo("m", "w8a8", "delta", "isolated", {}, Cost(1.0))
    path = tmp_path / "r.json"
    write(path, RunResult(info, tuple(ops), None, found))
    assert load(path).interactions == found
    text = path.read_text()
    for old, new, told in (
        ("[9.0, -3.0, 1.5]", "[9.0, -3.0]", "a row and a column for each of 3 ops"),
        ('["a", "b", "c"]', '["a", "b", "x"]', "'x' is no op of the file"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(QsensError, match=told):
            load(path)
