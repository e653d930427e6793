"""How many workers ``-n auto`` means."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.given_options import base_options
from pytest_qsens.memory import free_memory
from pytest_qsens.quant.schemes import scheme_named
from pytest_qsens.workers import cores, fitting

if TYPE_CHECKING:
    import pytest


def automatic_workers(config: pytest.Config) -> int | None:
    """How many workers ``-n auto`` means; ``None`` if no model is measured, or the environment says it."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    from pytest_qsens.models.resolve import resolve

    try:
        options = base_options(config)
        if options.model is None:
            return None
        weights = resolve(options.request).weight_bytes()
    except QsensError:  # it is told when the session starts
        return None
    kept = 0
    if options.mode != "isolated":  # of a config nothing is read yet: no scheme keeps more than two bytes
        kept = 2 if options.config is not None else scheme_named(options.scheme, "scheme").bytes_kept
    return fitting(cores(), free_memory(), weights, kept=kept)
