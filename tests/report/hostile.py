"""Results with texts in them that files must take for texts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytest_qsens.details import Channels, DataSet, Details, OpRanges, Sample
from pytest_qsens.ops import TOTAL
from pytest_qsens.results import Cost, OpResult, RunInfo, RunResult

if TYPE_CHECKING:
    from collections.abc import Sequence

TEXTS = (
    "<script>window.broken = 1</script>",
    "</script><script>window.broken = 2</script>",
    '"><img src=x onerror="window.broken = 3">',
    "'\"`&amp;",
    "line\u2028separator\u2029",
    "]]>",
    "{{ 7 * 7 }}{% raw %}",
    "<!-- open",
    "a|b|c **bold** [x](javascript:alert(1)) _u_ `code`",
    '=cmd|"/C calc"!A0',
    "@SUM(1+1)",
    "-2+3",
    "two\nlines",
    "\N{FULLWIDTH LESS-THAN SIGN}b\N{FULLWIDTH GREATER-THAN SIGN} \u202edesrever",
)

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)


def scores(nmse: float) -> dict[str, float | None]:
    """Scores of one mode."""
    return {"nmse": nmse, "sse": 100 * nmse, "mse": nmse, "sqnr_db": -10 * math.log10(nmse), "stderr": nmse / 10}


def measured(op: str, nmse: float, **more: object) -> OpResult:
    """Make an op with a score of its own."""
    return OpResult(op, "linear", "", "measured", None, scores(nmse), weights=64, **more)  # type: ignore[arg-type]


def channels(largest: Sequence[float]) -> Channels:
    """Ranges of a few channels."""
    ranked = sorted(enumerate(largest), key=lambda pair: -pair[1])[:5]
    return Channels(len(largest), tuple(largest), sorted(largest)[len(largest) // 2], tuple(ranked))


def hostile() -> RunResult:
    """Make a result with such a text in every place that holds one."""
    ops = [
        OpResult(
            text,
            text,
            text,
            "measured",
            text,
            scores(10.0 ** -(2 + place / 4)),
            {"gain": 0.1 / (place + 1)},
            scheme=text,
        )
        for place, text in enumerate(TEXTS)
    ]
    ops += [
        OpResult(f"layers.{block}.{text}", "linear", "", "measured", None, scores(1e-3))
        for block in (0, 1)
        for text in TEXTS
    ]
    ops += [OpResult(f"failed {text}", "linear", "", "failed", text) for text in TEXTS]
    ranges = tuple(OpRanges(text, text, channels([1.0, 20.0, 1.0]), channels([0.5, 0.5])) for text in TEXTS)
    data = (DataSet("evaluation", len(TEXTS), "samples", tuple(Sample(text, PIXEL, (1, 1)) for text in TEXTS)),)
    every = "".join(TEXTS)
    run = RunInfo(
        every,
        every,
        every,
        "both",
        {f"key {text}": text for text in TEXTS},
        Cost(1.0, 0.1, 0.5),
        engine_reason=every,
        checkpoint=every,
        config={"path": every, "format": every, "sha256": every, "down": every},
    )
    return RunResult(run, tuple(ops), measured(TOTAL, 0.5), details=Details(ranges, data, TEXTS))


def large(count: int) -> RunResult:
    """Make the result of a model with many ops, in both modes."""
    kinds = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    ops = []
    for place in range(count):
        block, kind = divmod(place, len(kinds))
        nmse = 10.0 ** -(2 + 7 * (place * 7919 % count) / count)
        gain = nmse * math.sin(place)
        name = f"model.layers.{block}.{kinds[kind]}"
        noisy: dict[str, float | None] = {"nmse": 0.1, "gain": gain, "distinguishable": place % 3 > 0}
        ops.append(
            OpResult(
                name, "linear", f"model.layers.{block}", "measured", None, scores(nmse), noisy, weights=10**6 + place
            )
        )
    run = RunInfo("large", "w8a8", "delta", "both", {"torch": "2.13.0", "cpu": "some"}, Cost(100.0, 1.0, 0.3))
    return RunResult(run, tuple(ops), measured(TOTAL, 0.5))
