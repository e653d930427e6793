"""Gates on what is predicted of the whole model from single ops, and on how far that is from what was measured.

They need ``--qsens-interactions``, and are judged once, when all ops are through: ``total.additive_gap<=10%``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.limits import taken_apart
from pytest_qsens.ops import TOTAL
from pytest_qsens.results import round_score
from pytest_qsens.run_verdicts import RunVerdict
from pytest_qsens.thresholds import NUMBER, percentage, value_of

if TYPE_CHECKING:
    from pytest_qsens.results import OpResult

_ABOUT = {
    "additive": "sum of the isolated nmse",
    "quadratic": "nmse predicted with interactions",
    "additive_gap": "sum of the isolated nmse",
    "quadratic_gap": "nmse predicted with interactions",
}
_GAP = "_gap"
_AMOUNT = re.compile(rf"{NUMBER}\s*(?P<percent>%?)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class JointGate:
    """The most that a prediction of the whole model's NMSE, or its distance from the measured one, may be.

    ``name`` is one of ``additive``, ``quadratic``, ``additive_gap`` and ``quadratic_gap``. A gap is
    ``|predicted - measured| / measured``.
    """

    name: str
    bound: float

    def __str__(self) -> str:
        """Give the text that `parse_joint` reads as this gate."""
        return f"{TOTAL}.{self.name}<={self.amount}"

    @property
    def amount(self) -> str:
        """The part after the sign."""
        return percentage(self.bound) if self.name.endswith(_GAP) else repr(self.bound)

    def judge(self, total: OpResult | None) -> RunVerdict:
        """Tell whether it holds for the whole model."""
        scores = (total and total.status == "measured" and total.isolated) or {}
        measured, predicted = scores.get("nmse"), scores.get(self.name.removesuffix(_GAP))
        if predicted is None or measured is None:
            return RunVerdict(self, "not judged", "not all ops and the whole model were measured, with interactions")
        about, found = _ABOUT[self.name], predicted
        told = f"{about} {predicted:.4g}"
        if self.name.endswith(_GAP):
            found = abs(predicted - measured) / measured if measured else math.inf if predicted else 0.0
            off = f" ({predicted / measured - 1:+.1%})" if measured else ""
            told = f"{told}, measured {measured:.4g}{off}"
        return RunVerdict(self, "held" if round_score(found) <= self.bound else "failed", told)


def is_joint(text: str) -> bool:
    """Whether a limit is one of what is predicted of the whole model."""
    return re.split(r"[<>]", text)[0].strip().rpartition(".")[2] in _ABOUT


def parse_joint(text: str, where: str) -> JointGate:
    """Read ``total.additive_gap<=10%``, ``quadratic_gap<=0.1`` or ``total.additive<=1e-3``.

    Raises:
        QsensError: If it is of single ops, has another sign, or an amount that is no number from 0 on.

    """
    glob, name, sign, given = taken_apart(text, where)
    if glob not in (None, TOTAL):
        raise QsensError(f"{where}: {name} is of the whole model, and not of {glob!r}. Write {TOTAL}.{name}<={given}.")
    match = _AMOUNT.fullmatch(given)
    gap = name.endswith(_GAP)
    value = value_of(match["number"], percent=bool(match["percent"])) if match else math.inf
    if sign != "<=" or match is None or not math.isfinite(value) or (match["percent"] and not gap):
        example = "10% of the measured nmse" if gap else "0.001"
        raise QsensError(
            f"{where}: {text.strip()!r} is no limit of {name}, of which higher is worse. Write {TOTAL}.{name}<="
            f"{'10%' if gap else '0.001'}, {example} at most."
        )
    return JointGate(name, value)
