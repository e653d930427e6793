"""What a plan chooses from: for every op, or group of ops, the schemes it was measured under, and what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Chosen = NDArray[np.bool_]
    """Of every `Candidate`, whether it is taken; a unit with none that is stays unquantized."""


@dataclass(frozen=True)
class Unit:
    """Ops that get one scheme.

    Attributes:
        name: Of the op, or of the group.
        ops: Names of its ops.
        types: Of each of them; of members of a group with several types, all of these.
        values: Of their weights, or those that a cache stores of a token; ``None`` if the result files do not tell.
        kept: Why it stays unquantized, if it has to.

    """

    name: str
    ops: tuple[str, ...]
    types: tuple[str, ...]
    values: int | None
    kept: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A unit under a scheme.

    Attributes:
        unit: Its place in the list of units.
        scheme: Name of the scheme of all its ops; or, of some of them, op → name of its scheme.
        bits: Of one of its values under that scheme.
        nmse: Sum of the isolated NMSEs of its ops.
        sketch: Sum of their sketches (`pytest_qsens.interactions`), if there are any.
        own: Predicted NMSE of the unit alone: ``nmse`` with the interactions of its ops, if there are sketches.

    """

    unit: int
    scheme: str | Mapping[str, str]
    bits: float
    nmse: float
    own: float
    sketch: Floats | None = None

    def scheme_of(self, op: str) -> str | None:
        """Name of the scheme of an op of its unit; ``None`` if it stays as it is."""
        return self.scheme if isinstance(self.scheme, str) else self.scheme.get(op)


@dataclass(frozen=True)
class Problem:
    """All units and candidates.

    Attributes:
        model: Label of the model.
        schemes: Those of the result files, in their order.
        units: In the order of the model.
        candidates: Of all units that can be quantized.
        unquantized: Bits of a value that is not quantized.
        notes: What has to be told about the input.
        of_cache: Whether it is of keys and values, not of layers.

    """

    model: str
    schemes: tuple[str, ...]
    units: tuple[Unit, ...]
    candidates: tuple[Candidate, ...]
    unquantized: float
    notes: tuple[str, ...] = ()
    of_cache: bool = False

    @property
    def value(self) -> str:
        """What bits are those of."""
        return "cached value" if self.of_cache else "weight"

    @cached_property
    def owners(self) -> NDArray[np.intp]:
        """Unit of each candidate."""
        return np.array([candidate.unit for candidate in self.candidates], dtype=np.intp)

    @cached_property
    def nmse(self) -> Floats:
        """Additive error of each candidate."""
        return np.array([candidate.nmse for candidate in self.candidates])

    @cached_property
    def own(self) -> Floats:
        """Predicted error of each candidate alone."""
        return np.array([candidate.own for candidate in self.candidates])

    @property
    def interacting(self) -> bool:
        """Whether interactions are known."""
        return bool(self.candidates) and all(candidate.sketch is not None for candidate in self.candidates)

    @cached_property
    def cross(self) -> Floats | None:
        """Product of the changes of each two candidates of different units; ``None`` if interactions are not known."""
        if not self.interacting:
            return None
        sketches = np.stack([candidate.sketch for candidate in self.candidates if candidate.sketch is not None])
        products: Floats = sketches @ sketches.T
        products[self.owners[:, None] == self.owners] = 0.0
        return products

    @property
    def dimensions(self) -> int:
        """Values in a sketch; 0 without."""
        sketch = self.candidates[0].sketch if self.interacting else None
        return 0 if sketch is None else len(sketch)

    @cached_property
    def saved(self) -> Floats:
        """Bits that each candidate saves, all its values together."""
        return np.array([(self.unquantized - c.bits) * (self.units[c.unit].values or 0) for c in self.candidates])

    @cached_property
    def counts(self) -> Floats:
        """How many ops each candidate quantizes."""
        return np.array(
            [float(len(self.units[c.unit].ops if isinstance(c.scheme, str) else c.scheme)) for c in self.candidates]
        )

    @cached_property
    def values(self) -> int:
        """All values, of units that stay unquantized, too."""
        return sum(unit.values or 0 for unit in self.units)

    @property
    def unsized(self) -> tuple[Unit, ...]:
        """Units whose size is not known and has to be: not that of keys and values that no data reach."""
        able = {candidate.unit for candidate in self.candidates}
        unknown = [place for place, unit in enumerate(self.units) if unit.values is None]
        return tuple(self.units[place] for place in unknown if place in able or not self.of_cache)

    @property
    def sized(self) -> bool:
        """Whether bits can be told."""
        return bool(self.values) and not self.unsized

    @property
    def ops(self) -> int:
        """How many ops there are."""
        return sum(len(unit.ops) for unit in self.units)

    def most(self, gains: Floats) -> float:
        """Sum over units of the most that one of their candidates gains."""
        best = np.zeros(len(self.units))
        np.maximum.at(best, self.owners, gains)
        return math.fsum(best)

    def additive(self, chosen: Chosen) -> float:
        """Sum of the isolated errors."""
        return math.fsum(self.nmse[chosen])

    def predicted(self, chosen: Chosen) -> float:
        """Predict the joint error: with interactions, if they are known."""
        if self.cross is None:
            return self.additive(chosen)
        own = math.fsum(self.own[chosen])
        return max(0.0, own + float(self.cross[np.ix_(chosen, chosen)].sum()))

    def bits(self, chosen: Chosen) -> float:
        """Mean bits of a value."""
        return self.unquantized - math.fsum(self.saved[chosen]) / self.values

    def assignment(self, chosen: Chosen) -> dict[str, str | None]:
        """Op → scheme, ``None`` for those that stay unquantized; in the order of the model."""
        taken = {c.unit: c for c, is_taken in zip(self.candidates, chosen, strict=True) if is_taken}
        return {
            op: None if (c := taken.get(place)) is None else c.scheme_of(op)
            for place, unit in enumerate(self.units)
            for op in unit.ops
        }


def own_error(nmse: float, sketches: Sequence[Floats]) -> float:
    """Predict the error of several ops from the sum of their isolated errors and how they meet."""
    joint = np.sum(sketches, axis=0)
    return max(0.0, nmse + float(joint @ joint) - math.fsum(float(sketch @ sketch) for sketch in sketches))
