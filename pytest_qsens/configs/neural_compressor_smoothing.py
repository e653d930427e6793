"""Intel Neural Compressor: what its recipe ``smooth_quant`` does to which layers.

Semantics are those of neural-compressor 3.7.1, ``adaptor/pytorch.py`` and ``adaptor/torch_utils/waq``. Without folding,
its default, a static run rounds all linear layers, and nothing else, in a way of its own (``qdq_quantize``): inputs are
multiplied in front of them, ranges are those of the extremes, outputs are not requantized.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.fields import ConfigFields
from pytest_qsens.configs.rules import Problem
from pytest_qsens.errors import QsensError
from pytest_qsens.files import typed
from pytest_qsens.quant.op_scheme import OpScheme, SmoothQuant, Unknown, parse
from pytest_qsens.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_qsens.ops import Op

SHARING = "smoothed layers share scales where its trace finds one layer before them that nothing else reads"
"""What a config cannot tell, for people."""

_OWN_FORMAT = "Write the schemes in our own format ('_smoothquant0.7' or '_smoothquant0.7_unshared' at their end)"
FOLDED = f"which layers can be folded depends on the graph that it traces, and is not simulated. {_OWN_FORMAT}"
_QDQ = parse("w8a8_static_minmax")


@dataclass(frozen=True)
class Smoothed:
    """That linear layers are rounded as ``qdq_quantize`` does it, and how they are smoothed before.

    ``alpha`` is the strength, or that of each layer by name; ``None``: it is not simulated, and told. ``unshared`` are
    layers whose scales are known to be those of no other.
    """

    alpha: float | Mapping[str, float] | None
    where: str
    unshared: frozenset[str] = field(default=frozenset())

    def of(self, op: Op, scheme: OpScheme | Unknown | None) -> OpScheme | Unknown | None:
        """Return how an op is rounded that would be otherwise quantized like this."""
        if op.type != "linear" or not isinstance(scheme, OpScheme) or _QDQ is None:
            return None
        alpha = self.alpha.get(op.name) if not isinstance(self.alpha, float | None) else self.alpha
        smoothing = None if alpha is None else SmoothQuant(alpha, shared=op.name not in self.unshared)
        return replace(_QDQ, smoothing=smoothing)

    def without_strength(self, decided: Iterable[tuple[str, OpScheme | Unknown | None]]) -> list[Problem]:
        """Name the layers that are quantized and have no strength where others are given theirs by name."""
        if isinstance(self.alpha, float | None):
            return []
        names = tuple(op for op, scheme in decided if scheme is not None and op not in self.alpha)
        if not names:
            return []
        what = (
            f"{first_of(names, 2)}: quantized, not named in 'alpha', and not smoothed here. Neural Compressor "
            "gives them the strength of the first layer that reads the same tensor, or fails. Name all layers"
        )
        return [Problem(self.where, what, names)]


def read_smoothing(recipes: ConfigFields, approach: str) -> Smoothed | None:
    """Read ``smooth_quant`` and ``smooth_quant_args`` of recipes; ``None`` if layers are rounded as without them.

    Raises:
        QsensError: If a value is of a wrong type, or none that Neural Compressor has.

    """
    wanted = recipes.flag("smooth_quant", default=False)
    arguments = recipes.inner("smooth_quant_args")
    info = recipes.take("smoothquant_op_info")
    if not wanted:
        return None
    if arguments is None:
        arguments = ConfigFields({}, recipes.at("smooth_quant_args"), recipes.problems)
    alpha, folding = read_alpha(arguments), arguments.flag("folding", default=False)
    arguments.skip("default_alpha", "auto_alpha_args")
    arguments.changes_numbers("weight_clip", "weights of 0 have no least magnitude", True)
    arguments.finish()
    why = None
    if folding:
        why = FOLDED
    elif approach != "static":
        why = f"with approach {approach!r} and without folding it smooths nothing. Take it out"
    if why is not None:
        recipes.problem("smooth_quant", why)
        return None
    return Smoothed(alpha, arguments.at("alpha"), _unshared(info))


def read_alpha(arguments: ConfigFields) -> float | dict[str, float] | None:
    """Read ``alpha``; ``None`` if it is found by tuning, which is told.

    Raises:
        QsensError: If it is no strength, nor one for each layer.

    """
    value, where = arguments.take("alpha"), arguments.at("alpha")
    if value is None:
        return SmoothQuant.alpha
    if isinstance(value, list) and value:
        if len(value) > 1:
            arguments.problem("alpha", f"{as_text(value)}: Neural Compressor tries one after the other as it tunes")
        value = value[0]
    if isinstance(value, dict):
        return {typed(name, str, where): _strength(each, f"{where}, {as_text(name)}") for name, each in value.items()}
    if value == "auto":
        arguments.problem("alpha", f"'auto' finds a strength for each layer, which is not simulated. {_OWN_FORMAT}")
        return None
    return _strength(value, where)


def _strength(value: object, where: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:  # type: ignore[operator]  # a number
        raise QsensError(f"{where}: {as_text(value)} is not possible, a number from 0 to 1 or 'auto' is")
    return float(value)  # type: ignore[arg-type]  # as above


def _unshared(info: object) -> frozenset[str]:
    """Find layers whose scales, which a run has written down, are those of no other."""
    scales = info.get("sq_linear") if isinstance(info, dict) else None
    if not isinstance(scales, dict):
        return frozenset()
    texts = {name: repr(scale) for name, scale in scales.items()}
    count = Counter(texts.values())
    return frozenset(name for name, text in texts.items() if isinstance(name, str) and count[text] == 1)
