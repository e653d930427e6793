"""How the range of static activations is found, by the names of the field. No torch needed."""

from __future__ import annotations

import re

OBSERVERS = ("minmax", "moving_average", "histogram", "percentile", "mse", "entropy")
"""What is known; ``percentile`` may be followed by how many per cent of the values are inside, ``percentile99.9``."""

AVERAGING_CONSTANT = 0.01
"""Weight of the last call in a moving average: the default of torch, llm-compressor and ONNX Runtime."""

USUAL_PERCENTILE = 99.99
_PERCENTILE = re.compile(r"percentile([5-9]\d(?:\.\d{1,9})?)?", re.ASCII)

PATTERN = rf"(?:{'|'.join(name for name in OBSERVERS if name != 'percentile')}|{_PERCENTILE.pattern})"
"""Of the names of all."""


def usual_observer(dtype: str) -> str:
    """Name of what is used where nothing else is said.

    Of integers torch's `HistogramObserver`, as its x86 backend and Intel Neural Compressor use it; of floats the
    largest magnitude, which is what tools scale them by.
    """
    return "histogram" if dtype.startswith("int") else "minmax"


def percentile_of(observer: str) -> float | None:
    """Per cent of the values that are inside of the range; ``None`` if it is another observer.

    >>> percentile_of("percentile99.9"), percentile_of("percentile"), percentile_of("mse")
    (99.9, 99.99, None)
    """
    match = _PERCENTILE.fullmatch(observer)
    if match is None:
        return None
    return USUAL_PERCENTILE if match[1] is None else float(match[1])


def canonical(observer: str) -> str | None:
    """Only name of what this means; ``None`` if it means nothing.

    >>> canonical("percentile99.990"), canonical("percentile99.9"), canonical("kl")
    ('percentile', 'percentile99.9', None)
    """
    percentile = percentile_of(observer)
    if percentile is not None:
        return percentile_name(percentile)
    return observer if observer in OBSERVERS else None


def percentile_name(percentile: float) -> str:
    """Name of the observer that keeps so many per cent of the values, from 50 up to less than 100."""
    if percentile == USUAL_PERCENTILE:
        return "percentile"
    return "percentile" + f"{percentile:.9f}".rstrip("0").rstrip(".")
