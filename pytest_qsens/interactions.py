"""How errors of several ops meet at the output: the joint error of any set of ops, predicted from isolated runs.

An op that is quantized alone changes the output by a vector v. If changes add up, a set of ops has the squared error
‖Σ vᵢ‖² = Σᵢ ‖vᵢ‖² + Σᵢ≠ⱼ vᵢ·vⱼ: the first sum is that of the isolated errors, the second is how they meet. Result files
keep a sketch of every v (`pytest_qsens.sketches`), in units in which ‖v‖² is the NMSE. Sketches of one model on the
same data can be multiplied, whichever process, run or scheme they come from.
"""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pytest_qsens.errors import QsensError
from pytest_qsens.quant.assignment import ADDED_AS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pytest_qsens.results import Interactions, OpResult

    Floats = NDArray[np.float64]

DIMENSIONS = 4096
"""Values in a sketch. A shorter one is the change itself, and products of those are exact."""


class Predicted(NamedTuple):
    """The NMSE of several ops quantized at once, predicted from that of each alone."""

    additive: float
    quadratic: float


def encode(sketch: Floats) -> str:
    """Write a sketch as text: base64 of little-endian fp32."""
    return base64.b64encode(sketch.astype("<f4").tobytes()).decode()


def decode(text: str, where: str) -> Floats:
    """Read what `encode` wrote, as float64.

    Raises:
        QsensError: If it is no sketch; names ``where``.

    """
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float64)
    except (binascii.Error, ValueError) as error:
        raise QsensError(f"{where}, 'sketch': {str(error).lower()}. Measure again with --qsens-interactions") from error
    if not 0 < len(values) <= DIMENSIONS or not np.isfinite(values).all():
        raise QsensError(
            f"{where}, 'sketch': {len(values)} values, of which {int(np.isfinite(values).sum())} are finite; 1 to "
            f"{DIMENSIONS} finite ones are needed. Measure again with --qsens-interactions"
        )
    return values


def relative_error(dimensions: int) -> float:
    """Bound the standard error that sketching gives a prediction with interactions, relative to the prediction.

    That of a squared length is at most √(2/k), for k values (Charikar, Chen, Farach-Colton, Finding frequent items in
    data streams, 2002), once for the columns of wide outputs and once for all: 0.031 at most. A prediction differs
    from it by the isolated errors, which are exact.
    """
    return 0.0 if dimensions < DIMENSIONS else math.sqrt(4 / DIMENSIONS)


def predict(ops: Sequence[OpResult], where: str = "result") -> Predicted | None:
    """Predict the NMSE of all ops of a model at once; ``None`` unless all that can be measured have a sketch.

    Those that a config leaves unquantized are none of them, although it may be measured what quantizing them would do.
    """
    quantized = [op for op in ops if op.status not in ("unquantizable", "unexercised", "unquantized")]
    quantized = [op for op in quantized if ADDED_AS not in (op.scheme or "")]
    if not quantized or any(op.sketch is None or op.isolated is None or op.status != "measured" for op in quantized):
        return None
    sketches = _decoded(quantized, where)
    additive = math.fsum((op.isolated or {}).get("nmse") or 0.0 for op in quantized)
    joint = np.sum(sketches, axis=0)
    cross = float(joint @ joint) - math.fsum(float(sketch @ sketch) for sketch in sketches)
    return Predicted(additive, max(0.0, additive + cross))


def matrix(ops: Sequence[OpResult], where: str = "result") -> Interactions | None:
    """Make the matrix of the interactions of all ops that have a sketch; ``None`` if none has.

    Raises:
        QsensError: If a sketch is none, or they are of different outputs; names ``where``.

    """
    from pytest_qsens.results import Interactions

    known = [op for op in ops if op.sketch is not None and op.isolated is not None and op.status == "measured"]
    if not known:
        return None
    sketches = _decoded(known, where)
    products = np.stack(sketches) @ np.stack(sketches).T
    np.fill_diagonal(products, [(op.isolated or {}).get("nmse") or 0.0 for op in known])
    return Interactions(tuple(op.op for op in known), tuple(map(tuple, products.tolist())))


def _decoded(ops: Sequence[OpResult], where: str) -> list[Floats]:
    sketches = [decode(op.sketch or "", f"{where}, op {op.op!r}") for op in ops]
    if len({len(sketch) for sketch in sketches}) > 1:
        raise QsensError(f"{where}: sketches of different lengths, which are not of one output. Measure all ops again")
    return sketches


def with_prediction(total: OpResult | None, ops: Sequence[OpResult], where: str = "result") -> OpResult | None:
    """Put what is predicted of the whole model beside what was measured of it, if both are known.

    That are ``additive``, the sum of the isolated NMSEs of its ops, and ``quadratic``, the NMSE with interactions.

    Raises:
        QsensError: If a sketch is none; names ``where``.

    """
    if total is None or total.isolated is None or total.status != "measured":
        return total
    found = predict(ops, where)
    return total if found is None else replace(total, isolated=total.isolated | found._asdict())
