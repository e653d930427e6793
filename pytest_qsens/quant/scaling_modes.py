"""How scales are found that are powers of two (E8M0), as the blocks of MX formats share them."""

from __future__ import annotations

POWERS_OF_TWO = ("mxfp8", "mxfp6", "mxfp4", "mxint8")
"""Formats whose scales are powers of two alone (E8M0)."""

SCALING_MODES = ("floor", "rceil", "ceil", "even")
"""How a block's largest magnitude becomes a power of two, in torchao's words (``ScaleCalculationMode``).

``floor`` is that of OCP Microscaling Formats v1.0, 6.3, and usual here: the power of two up to it, less the largest
exponent of the elements. ``rceil``: the least power of two with which nothing is clipped. ``ceil``: the power of two
from it on, less that exponent. ``even``: as ``floor``, of the magnitude rounded to the mantissa of the elements.
"""


def canonical_mode(dtype: str, mode: str) -> str:
    """Let the usual mode have one name, the empty one.

    Raises:
        ValueError: If it is unknown, or scales of the format have none.

    """
    if mode and (dtype not in POWERS_OF_TWO or mode not in SCALING_MODES):
        raise ValueError(f"scales of {dtype} have no mode {mode!r}")
    return "" if mode == SCALING_MODES[0] else mode
