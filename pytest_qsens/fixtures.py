"""What a test function can take: the calibrated model, one of its ops, and its scores."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn, cast

import pytest

from pytest_qsens.collection.catalogue import catalogue
from pytest_qsens.collection.parametrized import SPEC, planned
from pytest_qsens.errors import QsensError
from pytest_qsens.measure import BudgetTooShort, RunAborted, bench
from pytest_qsens.ops import TOTAL
from pytest_qsens.properties import of_result, of_verdict
from pytest_qsens.rerun import accept_command
from pytest_qsens.result_payloads import to_payload
from pytest_qsens.thresholds import DEFAULT_FAIL, parse_fail
from pytest_qsens.workers import place

if TYPE_CHECKING:
    from pytest_qsens.calibrated import CalibratedModel
    from pytest_qsens.collection.model import Model
    from pytest_qsens.gates import OpGates
    from pytest_qsens.known_scores import Measured
    from pytest_qsens.ops import Op
    from pytest_qsens.options import Options, RunSpec
    from pytest_qsens.results import OpResult, Payload, Scores
    from pytest_qsens.syrupy_extension import Score

_RECORDS = pytest.StashKey["list[_Record]"]()


class OpFailed(pytest.fail.Exception):  # type: ignore[name-defined,misc]  # an attribute set on a function
    """An op has no score although it should have one: the test fails, it is not an error in the test."""


class _Record:
    """One result that a test looked at, and the score it was given for it."""

    def __init__(self, options: Options, model: Model, measured: Measured) -> None:
        self.options = options
        self.model = model
        self.result = measured.result
        self.spent = measured.spent
        self.score: Score | None = None

    def payload(self) -> Payload:
        verdict = self.score.verdict if self.score else None
        entry = self.score.entry if self.score else None
        return {
            "model": self.model.label,
            "scheme": self.options.label,
            "granularity": self.options.granularity,
            "result": to_payload(self.result),
            "spent": None if self.spent is None else float(self.spent),
            "verdict": verdict.kind if verdict else None,
            "lines": list(verdict.lines) if verdict else [],
            "within_noise": list(verdict.within_noise) if verdict else [],
            "compared": [
                [value if value is None or isinstance(value, str) else float(value) for value in comparison]
                for comparison in (verdict.compared if verdict else ())
            ],
            "entry": entry.to_payload() if entry else None,
        }


@pytest.fixture(scope="session", name=SPEC)
def qsens_spec(request: pytest.FixtureRequest) -> RunSpec:
    """Tell which model a test is about; nothing is loaded for that."""
    return cast("RunSpec", _parameter(request, "qsens_model"))


@pytest.fixture(scope="session")
def qsens_model(request: pytest.FixtureRequest, _qsens_spec: RunSpec) -> CalibratedModel:
    """Calibrated model that all ops share (`pytest_qsens.calibrated.CalibratedModel`)."""
    # The session-scoped request knows no test, and the catalogue has every model that was collected.
    return bench(request.config).calibrated(_qsens_spec, catalogue(request.config).known(_qsens_spec))


@pytest.fixture
def qsens_op(request: pytest.FixtureRequest) -> Op:
    """One op of the model, or group (`pytest_qsens.ops.Op`); a test that takes it runs once for each."""
    return cast("Op", _parameter(request, "qsens_op"))


@pytest.fixture
def qsens_score(request: pytest.FixtureRequest, _qsens_spec: RunSpec, qsens_op: Op) -> Score:
    """Score of ``qsens_op``, for ``assert qsens_score == snapshot``; its numbers are in ``qsens_score.result``.

    A test of an op without a score is skipped with the reason, or fails: see `_without_score`.
    """
    options = _options(request)
    model = catalogue(request.config).model(options)
    measured = bench(request.config).score(_qsens_spec, model, qsens_op, options.modes)
    return _score(request, options, model, measured, options.gates_for(qsens_op.name, qsens_op.member_names))


@pytest.fixture
def qsens_total(request: pytest.FixtureRequest, _qsens_spec: RunSpec) -> Score:
    """Score of the whole model, everything that can be quantized quantized at once."""
    options = _options(request)
    model = catalogue(request.config).model(options)
    measured = bench(request.config).total(_qsens_spec, model)
    known = {metric for scores in measured.result.modes.values() for metric in scores}
    # these two are of single ops only. What is left gates the whole model, or the default if that is nothing.
    gates = options.gates_for(TOTAL)
    thresholds = tuple(t for t in gates.thresholds if t.metric in known or t.metric not in ("gain", "loss"))
    if not thresholds and gates.needs_snapshot:
        thresholds = parse_fail(DEFAULT_FAIL)
    return _score(request, options, model, measured, gates._replace(thresholds=thresholds))


def _options(request: pytest.FixtureRequest) -> Options:
    try:
        return planned(request.node)
    except QsensError as error:
        raise RunAborted(str(error)) from error


def _parameter(request: pytest.FixtureRequest, name: str) -> object:
    if not hasattr(request, "param"):
        raise OpFailed(
            f"qsens: {name} is one item for each op or model, which is decided at collection: name it, or a fixture "
            "that takes it, in the arguments of the test instead of asking for it while the test runs",
            pytrace=False,
        )
    return request.param


def _score(
    request: pytest.FixtureRequest,
    options: Options,
    model: Model,
    measured: Measured,
    gates: OpGates,
) -> Score:
    record = _Record(options, model, measured)
    result = record.result
    node: pytest.Item = request.node
    node.stash.setdefault(_RECORDS, []).append(record)
    node.user_properties += of_result(model.label, options.label, options.mode, result)
    estimated = tuple(result.intervals)
    if estimated:
        gated = options.gate_estimates and "nmse" in gates.metrics
        result = _at_least(result, bounds=gated)
        if not result.modes:
            pytest.skip(_told(record.result))
    elif result.status == "unrun":
        pytest.skip(f"{result.op}: {result.reason}")
    elif result.status != "measured":
        _without_score(request.config, record)

    from pytest_qsens.syrupy_extension import Score

    recorded = catalogue(request.config).snapshot(options, model).ops.get(result.op)
    if (estimated or not options.recording) and recorded is None and not gates.limits:
        pytest.skip(
            f"{result.op} has no line in the snapshot, and a run that estimates writes none: "
            f"{options.snapshot_path(model.label)}"
        )
    try:
        record.score = Score(
            result,
            thresholds=gates.thresholds,
            limits=gates.limits,
            needs_snapshot=gates.needs_snapshot and options.recording and not estimated,
            path=options.snapshot_path(model.label),
            model=model.label,
            scheme=options.label,
            granularity=options.granularity,
            accept=accept_command(request.config.invocation_params.args, options),
            evaluation=model.evaluation,
            estimated=estimated,
        )
        record.score.judge()  # what cannot be judged cannot for any op: stop before hours of measuring
        record.score.verdict = None  # the test has not compared anything yet, and may never do
    except QsensError as error:
        raise RunAborted(str(error)) from error
    return record.score


def _at_least(result: OpResult, *, bounds: bool) -> OpResult:
    """Take the modes with exact scores, and the lower bounds of estimates for scores, if they count.

    If a lower bound is past a threshold, all of the interval is.
    """
    modes: dict[str, Scores] = {mode: scores for mode, scores in result.modes.items() if mode not in result.intervals}
    modes |= {mode: {"nmse": low} for mode, (low, _) in result.intervals.items() if bounds}
    return replace(
        result, status="measured", isolated=modes.get("isolated"), fallback=modes.get("fallback"), intervals={}
    )


def _told(result: OpResult) -> str:
    """Say what is estimated of an op, and that this gates nothing."""
    parts = [
        f"{mode} nmse {result.modes[mode]['nmse']:.3g}, 90 % interval {low:.3g} to {high:.3g}"
        for mode, (low, high) in result.intervals.items()
    ]
    return f"{result.op} is estimated, which gates nothing: {'; '.join(parts)}"


def _without_score(config: pytest.Config, record: _Record) -> NoReturn:
    """Skip the test of an op without a score; fail if the op failed, or if its snapshot shows that it had one."""
    result, options = record.result, record.options
    reason = f"{result.op} is {result.status}: {result.reason}"
    if result.status == "failed":
        raise OpFailed(reason, pytrace=False)
    recorded = catalogue(config).snapshot(options, record.model).ops.get(result.op)
    if recorded is not None and recorded.modes and not options.snapshot_prune:
        advice = "Give data that reaches it, or remove" if result.status == "unexercised" else "Remove"
        raise OpFailed(
            f"{reason}, but it was measured when {options.snapshot_path(record.model.label)} was written: this run "
            f"covers less. {advice} its line with --snapshot-update --qsens-snapshot-prune",
            pytrace=False,
        )
    pytest.skip(reason)


def annotate(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Put what a test measured on its report as ``report.qsens``, builtin types only, as xdist can carry no others.

    The phase that decides the outcome carries it: the call, or the set-up if that skips or fails. Where the time went
    so far is on the next report of any test, whatever comes of the process after it.
    """
    error = call.excinfo.value if call.excinfo else None
    if isinstance(error, RunAborted):
        message = f"{error}{place(item.config)}"
        report.longrepr = f"qsens: {message}"
        not_measured = isinstance(error, BudgetTooShort)
        report.qsens = {"abort": message, "not_measured": not_measured}  # type: ignore[attr-defined]  # reports carry extras
        return
    decisive = call.when == "call" or (call.when == "setup" and not report.passed)
    records = item.stash.get(_RECORDS, []) if decisive else []
    for record in records:
        if record.score is not None and record.score.verdict is not None:
            item.user_properties += of_verdict(record.score.verdict, record.result)
    report.user_properties = list(item.user_properties)
    described = [bench(item.config).describe(record.options, record.model) for record in records]
    profiles, warnings = bench(item.config).profiles(), bench(item.config).warnings()
    if not records and not profiles and not warnings:
        return
    if records and isinstance(error, OpFailed):
        report.when = "call"  # an op that cannot be quantized is a failed test, not an error in its set-up
    report.qsens = {  # type: ignore[attr-defined]  # reports carry extras
        "records": [record.payload() for record in records],
        "facts": [facts for facts in described if facts is not None],
        "profiles": profiles,
        "warnings": warnings,
    }
