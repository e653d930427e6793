"""Arguments of ``qsens plan``. Importing this costs nothing."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from pytest_qsens.configs.names import WRITTEN
from pytest_qsens.models.arguments import add_model_arguments


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare them."""
    command.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULT.json",
        help="written by `pytest --qsens-json` in mode isolated or both, one for each scheme",
    )
    command.add_argument(
        "--budget-bits", type=_positive, metavar="B", help="lowest error at B bits a weight (or a cached value) at most"
    )
    command.add_argument(
        "--budget-nmse", type=_not_negative, metavar="X", help="smallest size at a predicted nmse of X"
    )
    command.add_argument("--keep", metavar="P%", help="lowest error with P%% of the ops unquantized")
    command.add_argument(
        "--spectrum",
        metavar="P,P,...",
        help="a family of plans, each with P%% of the bits saved that can be, such as 0,25,50,75,100; FILE gets the "
        "percentage in its name",
    )
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="config to write")
    command.add_argument(
        "--to",
        choices=WRITTEN,
        default="qsens",
        metavar="FORMAT",
        help=f"of the config: {', '.join(WRITTEN)} (default: qsens)",
    )
    command.add_argument(
        "--verify",
        action="store_true",
        help="measure every plan on the model and its data; with --budget-nmse, correct it until what is measured is "
        "within the budget",
    )
    add_model_arguments(command)
    command.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw size against error, .svg, .png or .pdf (extra `report`)"
    )
    command.add_argument(
        "--never", action="append", default=[], metavar="GLOB", help="leave these ops unquantized; repeatable"
    )
    command.add_argument(
        "--fused",
        action="append",
        default=[],
        metavar="PATTERN",
        help="ops that get one scheme, such as '*.attn.{wq,wk,wv}', before what --qsens-granularity fused knows; "
        "repeatable",
    )
    command.add_argument("--allow-estimated", action="store_true", help="plan with estimated scores, too")
    command.add_argument(
        "--unquantized-bits",
        type=_positive,
        default=16.0,
        metavar="B",
        help="of a weight (or a cached value) left as it is, default 16",
    )


def _positive(text: str) -> float:
    value = _not_negative(text)
    if not value:
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, not {text!r}")
    return value


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"a number from 0 on is needed, not {text!r}")
    return value
