"""The page: one HTML file with everything in it, which may load nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from pytest_qsens.ops import TOTAL
from pytest_qsens.report.diff import SAID
from pytest_qsens.report.directory import charts
from pytest_qsens.report.directory.channel_charts import range_cards
from pytest_qsens.report.directory.contents import STATUSES, ranked, unit_of
from pytest_qsens.report.measures import name_of, score
from pytest_qsens.report.numbers import seconds, typeset, typeset_decibels
from pytest_qsens.results import MODES, lost_in_noise

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pytest_qsens.diff import Change
    from pytest_qsens.report.directory.charts import Chart
    from pytest_qsens.report.directory.contents import Report
    from pytest_qsens.report.findings import Finding
    from pytest_qsens.report.measures import Measure
    from pytest_qsens.results import OpResult

_WORST = 10
_CHANGES = 40
"""Changes that are listed; the table has all of them."""

_GRAVEST = 3
"""Ops that the verdict names."""


def as_html(report: Report) -> str:
    """Give the text of the file."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    found = _Page(report)
    scripts = {"library": _library(), "code": _asset("page.js")}
    data = {"data": found.table(), "charts": [chart.spec for chart in found.charts]}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("page.html")).render(
        report=report,
        page=found,
        policy=_policy(scripts.values()),
        style=Markup(_asset("page.css")),  # noqa: S704  # files of this package
        scripts={name: Markup(text) for name, text in scripts.items()},  # noqa: S704  # as above
        data={name: Markup(as_script_data(value)) for name, value in data.items()},  # noqa: S704  # escaped there
        statuses=STATUSES,
        kinds=SAID,
    )


def as_script_data(value: object) -> str:
    """JSON that can stand inside a ``script`` element, whatever texts are in it: it holds no ``<``, ``>`` or ``&``."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(scripts: Any) -> str:  # noqa: ANN401  # of texts
    """Content-Security-Policy: nothing is loaded from anywhere, and no script runs but these."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _asset(name: str) -> str:
    return (files("pytest_qsens.report.directory") / "assets" / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed, as vl-convert carries them, in one script of about 0.9 MB."""
    import vl_convert

    found: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # of its own file nothing but this would end the element, and it is in no string of these libraries
    if "</script" in found.lower():
        raise ValueError("the plotting library holds an end tag of a script")
    return found


class _Page:
    """What the template shows, in the order of the page; charts are numbered as they are shown."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._result = report.result
        self._changes: Mapping[str, Change] = (
            {} if report.changes is None else {change.op: change for change in report.changes.changes}
        )
        self.charts: list[Chart] = []
        self.heat = [self._number(chart) for chart in charts.heat_maps(report)]
        found = charts.agreement(report)
        self.agreement = None if found is None else self._number(found)
        details = report.result.details
        cards = [] if details is None else range_cards(report, details)
        self.ranges = [(card, [self._number(chart) for chart in card.charts]) for card in cards]
        self.unit = unit_of(report.result)

    def _number(self, chart: Chart) -> tuple[int, Chart]:
        self.charts.append(chart)
        return len(self.charts) - 1, chart

    @property
    def figures(self) -> Iterator[tuple[str, str, str]]:
        """What is told first: label, value, note."""
        result, run = self._result, self._result.run
        total = (result.total and result.total.isolated) or {}
        if "nmse" in total:
            yield "everything quantized", typeset(total["nmse"]), f"NMSE; SQNR {typeset_decibels(total)}"
        ops = ranked(result)
        measure = self._report.measure
        if ops and measure is not None:
            yield f"worst {self.unit}", typeset(score(ops[0], measure)), _named(ops[0], measure)
        counts = self._report.counts
        scored = counts["measured"] + counts["estimated"]
        others = ", ".join(f"{count} {status}" for status, count in counts.items() if status != "measured")
        yield f"{self.unit}s with a score", f"{scored} of {len(result.ops)}", others or "all measured"
        forwards = run.cost.forwards_per_op
        cost = "" if forwards is None else f"{forwards:.2g} forwards per {self.unit}"
        yield "wall time", seconds(run.cost.wall_seconds), cost or f"engine {run.engine}"

    @property
    def worst(self) -> list[dict[str, Any]]:
        """The most sensitive ops, with the width of a bar in percent."""
        measure, ops = self._report.measure, ranked(self._result)[:_WORST]
        if measure is None or not ops:
            return []
        top = max(score(ops[0], measure) or 0.0, 1e-300)
        return [
            {
                "op": op.op,
                "about": " · ".join(filter(None, (op.type, op.scheme, _named(op, measure) if measure.also else None))),
                "value": typeset(score(op, measure)),
                "sqnr": typeset_decibels(op.modes[measure.of(op).mode]),
                "width": f"{100 * max(score(op, measure) or 0.0, 0.0) / top:.2f}",
                "note": self._note(op),
            }
            for op in ops
        ]

    @property
    def share(self) -> str | None:
        """How much of the error the most sensitive ops hold."""
        measure, ops = self._report.measure, ranked(self._result)
        if measure is None or len(ops) <= _WORST:
            return None
        values = [max(score(op, measure) or 0.0, 0.0) for op in ops]
        whole = sum(values)
        return f"{sum(values[:_WORST]) / whole:.0%}" if whole else None

    def _note(self, op: OpResult) -> str:
        measure = self._report.measure
        if measure is None:
            return ""
        own = measure.of(op)
        if own.mode in op.intervals:
            low, high = op.intervals[own.mode]
            return f"estimated, NMSE {low:.2g} to {high:.2g}"
        if lost_in_noise(op.modes[own.mode]):
            return "within noise"
        error = op.modes[own.mode].get("stderr")
        return "" if not error or own.metric != "nmse" else f"± {error:.1g}"

    @property
    def changed(self) -> list[Change]:
        """What is not as before, the gravest first; no more than `_CHANGES`."""
        return self._report.changed[:_CHANGES]

    @property
    def gravest(self) -> list[tuple[str, str]]:
        """The first few of what fails: name, and why."""
        return [(whole(op), line) for op, line in self._report.gravest[:_GRAVEST]]

    @property
    def exceeded(self) -> list[Finding]:
        """What is past a limit; no more than `_CHANGES`."""
        return self._report.exceeded[:_CHANGES]

    @property
    def present(self) -> list[tuple[str, int]]:
        """Statuses of this run, and of how many ops."""
        return list(self._report.counts.items())

    @property
    def reasons(self) -> list[tuple[str, str, int, str]]:
        """Why ops have no score: status, reason, number of ops, one of them."""
        found: dict[tuple[str, str], list[str]] = {}
        for op in self._result.ops:
            if op.status not in ("measured", "estimated") and op.reason:
                found.setdefault((op.status, op.reason), []).append(op.op)
        return [(status, reason, len(ops), ops[0]) for (status, reason), ops in found.items()]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """How and where it was measured."""
        run = self._result.run
        facts = {
            "model": run.model,
            "scheme" if run.config is None else "config": run.scheme,
            **{name: value for name, value in (run.config or {}).items() if name != "sha256"},
            "config SHA-256": (run.config or {}).get("sha256"),
            "mode": run.mode,
            "granularity": run.granularity,
            "engine": run.engine,
            "why this engine": run.engine_reason,
            "shard": None if run.shard is None else str(run.shard),
            "from the cache": str(run.cached) if run.cached else None,
            "reference forward": None if not run.cost.reference_seconds else seconds(run.cost.reference_seconds),
            "checkpoint": run.checkpoint,
            **run.environment,
        }
        return [(name, value) for name, value in facts.items() if value]

    @property
    def schemes(self) -> list[tuple[str, int]]:
        """Schemes of a config, and of how many ops."""
        counts: dict[str, int] = {}
        for op in self._result.ops:
            if op.scheme is not None:
                counts[op.scheme] = counts.get(op.scheme, 0) + 1
        return sorted(counts.items(), key=lambda pair: -pair[1])

    def table(self) -> dict[str, Any]:
        """Columns and rows of the table of all ops."""
        ops = [*self._result.ops, *([self._result.total] if self._result.total is not None else [])]
        columns: list[tuple[str, str, str, Any]] = [
            ("op", "op", "name", lambda op: whole(op.op)),
        ]
        measure = self._report.measure
        if measure is not None and measure.also is not None:
            columns.append(("score", "gain or loss", "score", lambda op: _ranked_by(op, measure)))
        for mode in MODES:
            for metric, title, kind in _COLUMNS[mode]:
                if any(metric in op.modes.get(mode, {}) for op in ops):
                    columns.append((f"{mode}.{metric}", title, kind, _Getter(mode, metric)))
        if self._report.exceeded:
            past = {finding.op for finding in self._report.exceeded}
            columns.append(("limits", "limits", "text", lambda op: "past a limit" if op.op in past else ""))
        if self._changes:
            columns.append(("change", "change", "text", lambda op: self._kind(op.op)))
            columns.append(("ratio", "new / old", "ratio", lambda op: self._ratio(op.op)))
        columns.append(("status", "status", "status", lambda op: op.status))
        columns.append(("type", "type", "text", lambda op: "" if op.op == TOTAL else op.type))
        if any(op.scheme is not None for op in ops):
            columns.append(("scheme", "scheme", "text", lambda op: op.scheme or ""))
        if any(op.weights for op in ops):
            columns.append(("weights", "weights", "count", lambda op: op.weights))
        if any(op.reason for op in ops):
            columns.append(("reason", "reason", "note", lambda op: op.reason or ""))
        first = None if measure is None else "score" if measure.also else f"{measure.mode}.{measure.metric}"
        return {
            "columns": [{"key": key, "title": title, "kind": kind} for key, title, kind, _ in columns],
            "rows": [[get(op) for *_, get in columns] for op in ops],
            "order": first,
            "unit": self.unit,
            "total": self._result.total is not None,
            "same": SAID["same"],
        }

    def _kind(self, op: str) -> str:
        return SAID[self._changes[op].kind] if op in self._changes else ""

    def _ratio(self, op: str) -> float | None:
        return self._changes[op].ratio if op in self._changes else None


_COLUMNS = {
    "isolated": (
        ("nmse", "isolated NMSE", "score"),
        ("sqnr_db", "SQNR, dB", "decibel"),
        ("stderr", "± stderr", "score"),
        ("kl", "KL", "score"),
        ("top1", "top-1", "share"),
    ),
    "fallback": (("gain", "fallback gain", "score"), ("nmse", "fallback NMSE", "score")),
    "added": (("loss", "added loss", "score"), ("nmse", "added NMSE", "score")),
}


def whole(op: str) -> str:
    """Name an op, or the whole model, for people."""
    return "everything quantized" if op == TOTAL else op


def _ranked_by(op: OpResult, measure: Measure) -> object:
    own = measure.of(op)
    return _Getter(own.mode, own.metric)(op)


def _named(op: OpResult, measure: Measure) -> str:
    own = measure.of(op)
    return f"{own.mode} {name_of(own.metric)}"


class _Getter:
    """Takes a score from a result; estimates come with their interval, an infinite value as a text."""

    def __init__(self, mode: str, metric: str) -> None:
        self._mode, self._metric = mode, metric

    def __call__(self, op: OpResult) -> object:
        scores = op.modes.get(self._mode)  # type: ignore[call-overload]  # one of the modes
        if scores is None or self._metric not in scores:
            return None
        value = scores[self._metric]
        if value is None:
            return "∞"
        value = float(f"{value:.5g}")
        interval = op.intervals.get(self._mode)  # type: ignore[call-overload]  # as above
        if self._metric == "nmse" and interval is not None:
            return [value, *(float(f"{bound:.3g}") for bound in interval)]
        return value
