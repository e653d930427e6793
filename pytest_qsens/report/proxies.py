"""What proxies are worth on a model, for people and for machines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pytest_qsens.proxies.functions import PROXIES
from pytest_qsens.report.numbers import coefficient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qsens.proxies.agreement import Agreement
    from pytest_qsens.proxies.command import Comparison
    from pytest_qsens.results import Payload

SCHEMA = 1


def report(found: Comparison) -> Iterator[str]:
    """Lines of the table, best proxy first."""
    exact = found.exact
    yield f"model {found.model}, scheme {found.scheme}: proxies beside the exact scores of {len(exact.nmse)} ops"
    yield f"exact: isolated nmse, {exact.where}"
    yield "rank correlation 1: same order, 0: unrelated, -1: reversed"
    yield "top: how many of the most sensitive ops are the same (in brackets: expected by chance)"
    yield f"forwards: time for all ops, in forwards of the evaluation data ({found.reference_seconds:.3g} s)"
    yield ""
    rows = [["proxy", "ops", "Spearman", "Kendall tau-b", "top", "forwards"], *map(_row, found.proxies)]
    if exact.forwards is not None:
        rows.append(["exact scores", str(len(exact.nmse)), "", "", "", f"{exact.forwards:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        numbers = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        yield f"  {name:<{widths[0]}}  {numbers}"
    for name, reason in found.without.items():
        yield f"not ranked: {name}: {reason}"


def _row(proxy: Agreement) -> list[str]:
    return [
        proxy.name,
        str(len(proxy.values)),
        coefficient(proxy.spearman),
        coefficient(proxy.kendall_tau_b),
        f"{proxy.top}/{proxy.places} ({proxy.expected_by_chance:.1f})",
        f"{proxy.forwards:.1f}",
    ]


def as_json(found: Comparison) -> str:
    """Everything, with the values of all ops, as JSON."""
    exact = found.exact
    document: Payload = {
        "schema": SCHEMA,
        "model": found.model,
        "scheme": found.scheme,
        "reference_seconds": found.reference_seconds,
        "exact": {
            "from": exact.where,
            "mode": "isolated",
            "metric": "nmse",
            "forwards": exact.forwards,
            "values": dict(exact.nmse),
        },
        "proxies": [
            {
                "proxy": proxy.name,
                "about": PROXIES[proxy.name].about,
                "spearman": proxy.spearman,
                "kendall_tau_b": proxy.kendall_tau_b,
                "top": {"k": proxy.places, "both": proxy.top, "expected_by_chance": proxy.expected_by_chance},
                "forwards": proxy.forwards,
                "values": dict(proxy.values),
            }
            for proxy in found.proxies
        ],
        "not_ranked": dict(found.without),
    }
    return json.dumps(document, ensure_ascii=False, allow_nan=False, indent=2) + "\n"
