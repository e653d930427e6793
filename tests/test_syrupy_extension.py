"""``assert score == snapshot`` with syrupy's stock fixture, in real pytest runs, alone and under xdist."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qsens.errors import QsensError
from pytest_qsens.results import OpResult, Scores, Status
from pytest_qsens.snapshot import Entry, Snapshot, dumps
from pytest_qsens.syrupy_extension import Score, ScoreExtension, explain
from pytest_qsens.thresholds import Verdict, parse_fail

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SUITE = """
import json
from pathlib import Path

import pytest
from pytest_qsens.results import OpResult
from pytest_qsens.syrupy_extension import Score
from pytest_qsens.thresholds import parse_fail

HERE = Path(__file__).parent
OPS = json.loads((HERE / "ops.json").read_text())

@pytest.fixture(params=OPS)
def score(request):
    score = Score(
        OpResult(request.param, "linear", "", "measured", None, **OPS[request.param]),
        thresholds=parse_fail("nmse:5%"),
        path=HERE / "qsens_snapshots" / "minilm" / "w8a8.json",
        model="minilm",
        scheme="w8a8",
        accept="pytest --snapshot-update",
    )
    yield score
    entry = score.entry
    outcome = [score.verdict and score.verdict.kind, score.accepted, entry and entry.to_payload()]
    (HERE / f"{request.param}.outcome").write_text(json.dumps(outcome))

def test_op(score, snapshot):
    assert score == snapshot
"""

STOCK = """
def test_text(snapshot):
    assert "hello" == snapshot
    assert {"a": 1} == snapshot(name="named")
"""


class Suite:
    """A directory with a test that compares scores given as data, and syrupy's own snapshots beside it."""

    def __init__(self, pytester: pytest.Pytester, workers: int) -> None:
        self.pytester = pytester
        self.arguments = ("-n", str(workers)) if workers else ("-p", "no:xdist")
        pytester.makepyfile(test_scores=SUITE, test_stock=STOCK)

    @property
    def file(self) -> Path:
        """The snapshot file."""
        return self.pytester.path / "qsens_snapshots" / "minilm" / "w8a8.json"

    @property
    def amber(self) -> Path:
        """The stock snapshots' file."""
        return self.pytester.path / "__snapshots__" / "test_stock.ambr"

    def record(self, **ops: Entry) -> None:
        """Put entries into the snapshot file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(dumps(Snapshot("minilm", "w8a8", {}, ops)))

    def run(self, ops: Mapping[str, Mapping[str, Scores]], *arguments: str) -> pytest.RunResult:
        """Run the tests on these measured scores."""
        self.pytester.path.joinpath("ops.json").write_text(json.dumps(ops))
        return self.pytester.runpytest_subprocess(*self.arguments, "-v", *arguments)

    def outcome(self, op: str) -> list[Any]:
        """Give kind of the verdict, whether accepted, and the entry to record."""
        outcome: list[Any] = json.loads((self.pytester.path / f"{op}.outcome").read_text())
        return outcome


@pytest.fixture(params=[0, 2], ids=["alone", "xdist"])
def suite(request: pytest.FixtureRequest, pytester: pytest.Pytester) -> Suite:
    """Give the suite, without xdist and distributed over two workers."""
    return Suite(pytester, request.param)


@pytest.fixture
def lone_suite(pytester: pytest.Pytester) -> Suite:
    """Give the suite without xdist, for what does not depend on it."""
    return Suite(pytester, 0)


def isolated(nmse: float, **more: float) -> dict[str, Scores]:
    """Make measured scores in isolated mode."""
    return {"isolated": {"nmse": nmse, **more}}


def entry(nmse: float, **more: float) -> Entry:
    """Make a recorded entry in isolated mode."""
    return Entry("linear", **isolated(nmse, **more))


def test_a_first_run_fails_and_says_how_to_accept(suite: Suite) -> None:
    """As with any snapshot: a new op fails with its scores and the command that accepts them; nothing is written."""
    result = suite.run({"a": isolated(0.25), "b": isolated(0.5)}, "test_scores.py")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            f"E*assert no snapshot yet for a in {suite.file}",
            "E*isolated nmse 0.25",
            "E*accept with: pytest --snapshot-update",
            "2 snapshots failed.",
        ]
    )
    assert suite.outcome("a") == ["new", False, None]
    assert not suite.file.parent.parent.exists()


def test_updating_accepts_without_writing(suite: Suite) -> None:
    """Under ``--snapshot-update`` new ops pass and are accepted; only the controller may write the file."""
    result = suite.run({"a": isolated(0.25), "b": isolated(0.5)}, "--snapshot-update")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["4 snapshots generated.*"])
    result.stdout.no_fnmatch_line("*warning*")
    assert suite.outcome("a") == ["new", True, {"isolated": {"nmse": 0.25}, "type": "linear"}]
    assert suite.outcome("b") == ["new", True, {"isolated": {"nmse": 0.5}, "type": "linear"}]
    assert not suite.file.parent.parent.exists()
    assert suite.amber.exists()


def test_verdicts_are_counted_in_syrupys_summary(suite: Suite) -> None:
    """Within the threshold and better pass, worse fails with old, new, change and limit."""
    suite.record(same=entry(0.25), better=entry(0.25), worse=entry(0.0312))
    text = suite.file.read_text()
    ops = {"same": isolated(0.26), "better": isolated(0.2), "worse": isolated(0.0401)}
    result = suite.run(ops, "test_scores.py")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            f"E*assert worse than the snapshot of worse in {suite.file}",
            "E*isolated nmse 0.0312 → 0.0401 (+28.5 %, limit 0.03276 = +5 %)",
            "E*accept with: pytest --snapshot-update",
            "1 snapshot failed. 2 snapshots passed.",
        ]
    )
    assert suite.outcome("same") == ["ok", False, None]
    assert suite.outcome("better") == ["improved", False, None]
    assert suite.outcome("worse") == ["regressed", False, None]
    assert suite.file.read_text() == text


def test_updating_records_what_moved(suite: Suite) -> None:
    """An update accepts regressions and improvements; what stayed within its threshold keeps its line."""
    suite.record(same=entry(0.25), better=entry(0.25), worse=entry(0.0312))
    ops = {"same": isolated(0.26), "better": isolated(0.2), "worse": isolated(0.0401), "new": isolated(1.0)}
    result = suite.run(ops, "test_scores.py", "--snapshot-update")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["1 snapshot passed. 1 snapshot generated. 2 snapshots updated."])
    assert suite.outcome("same") == ["ok", False, None]
    assert suite.outcome("better")[2]["isolated"] == {"nmse": 0.2}
    assert suite.outcome("worse")[2]["isolated"] == {"nmse": 0.0401}
    assert suite.outcome("new")[2]["isolated"] == {"nmse": 1.0}


def test_new_only_records_nothing_that_exists(suite: Suite) -> None:
    """Under ``--snapshot-update-new-only`` new ops are accepted and regressions fail as ever."""
    suite.record(better=entry(0.25), worse=entry(0.0312))
    ops = {"better": isolated(0.2), "worse": isolated(0.0401), "new": isolated(1.0)}
    result = suite.run(ops, "test_scores.py", "--snapshot-update-new-only")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["1 snapshot failed. 1 snapshot passed. 1 snapshot generated."])
    assert suite.outcome("better") == ["improved", False, None]
    assert suite.outcome("worse") == ["regressed", False, None]
    assert suite.outcome("new")[:2] == ["new", True]


def test_unused_stock_snapshots_are_found_and_ours_are_left(suite: Suite) -> None:
    """Syrupy reports and deletes its own unused snapshots only: ours stay although a test of theirs is gone."""
    suite.run({"a": isolated(0.25)}, "--snapshot-update").assert_outcomes(passed=2)
    suite.record(a=entry(0.25), gone=entry(0.5))
    text = suite.file.read_text()
    suite.pytester.makepyfile(test_stock='def test_text(snapshot):\n    assert "hello" == snapshot\n')
    result = suite.run({"a": isolated(0.25)})
    assert result.ret == 1
    result.stdout.fnmatch_lines(["2 snapshots passed. 1 snapshot unused."])
    result = suite.run({"a": isolated(0.25)}, "--snapshot-update")
    result.stdout.fnmatch_lines(["2 snapshots passed. 1 unused snapshot deleted.", "*test_text*named*test_stock.ambr*"])
    assert "named" not in suite.amber.read_text()
    assert suite.file.read_text() == text
    assert sorted(path.name for path in suite.pytester.path.rglob("*") if path.suffix in {".lock", ".tmp"}) == []


@pytest.mark.parametrize(
    ("comparison", "extension"),
    [
        ("snapshot == score", "amber.AmberSnapshotExtension"),
        ("snapshot(name='x') == score", "amber.AmberSnapshotExtension"),
        ("[score] == snapshot", "amber.AmberSnapshotExtension"),
        ("snapshot == score", "json.JSONSnapshotExtension"),
        ("not snapshot.assert_match(score)", "json.JSONSnapshotExtension"),
    ],
)
def test_the_wrong_way_round_stores_nothing(lone_suite: Suite, comparison: str, extension: str) -> None:
    """With the fixture on the left Python asks syrupy, which would keep a file of its own: it fails and says why."""
    lone_suite.pytester.makepyfile(test_scores=SUITE.replace("score == snapshot", comparison), test_stock="")
    default = f"--snapshot-default-extension=syrupy.extensions.{extension}"
    for arguments in ([], ["--snapshot-update"]):
        result = lone_suite.run({"a": isolated(0.25)}, default, *arguments)
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["E*QsensError: *write `assert score == snapshot`, with the score on the left*"])
    assert not (lone_suite.pytester.path / "__snapshots__").exists()


def test_the_fixture_serves_other_assertions_in_the_same_test(lone_suite: Suite) -> None:
    """Comparing a score leaves the fixture as it was: stock assertions before and after it use their own file."""
    body = 'assert "before" == snapshot\n    assert score == snapshot\n    assert "after" == snapshot\n'
    lone_suite.pytester.makepyfile(test_scores=SUITE.replace("assert score == snapshot", body), test_stock="")
    lone_suite.run({"a": isolated(0.25)}, "--snapshot-update").assert_outcomes(passed=1)
    amber = (lone_suite.pytester.path / "__snapshots__" / "test_scores.ambr").read_text()
    assert "before" in amber
    assert "after" in amber
    assert "nmse" not in amber
    lone_suite.record(a=entry(0.25))
    lone_suite.run({"a": isolated(0.25)}).assert_outcomes(passed=1)


def test_asserting_twice_is_asserting_once(lone_suite: Suite) -> None:
    """A second comparison of the same score sees the file, not what the first one accepted."""
    twice = "assert score == snapshot\n    assert score == snapshot"
    lone_suite.pytester.makepyfile(test_scores=SUITE.replace("assert score == snapshot", twice), test_stock="")
    lone_suite.run({"a": isolated(0.25)}, "--snapshot-update-new-only").assert_outcomes(passed=1)
    assert lone_suite.outcome("a")[:2] == ["new", True]


def test_a_damaged_snapshot_is_an_error_and_not_updated_over(lone_suite: Suite) -> None:
    """A malformed file fails the test with its name and line, even when updating, and is left as it is."""
    lone_suite.record(a=entry(0.25))
    lone_suite.file.write_text("{\n<<<<<<< HEAD\n")
    result = lone_suite.run({"a": isolated(0.25)}, "test_scores.py", "--snapshot-update")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"E*QsensError: {lone_suite.file}, line 2: malformed JSON*"])
    assert lone_suite.file.read_text() == "{\n<<<<<<< HEAD\n"


def test_what_goes_wrong_inside_syrupy_is_not_swallowed(lone_suite: Suite) -> None:
    """Syrupy turns exceptions into a false comparison; asking for a diff that scores do not have shows the real one."""
    body = SUITE.replace("score == snapshot", "score == snapshot(diff='other')")
    lone_suite.pytester.makepyfile(test_scores=body, test_stock="")
    result = lone_suite.run({"a": isolated(0.25)}, "--snapshot-update")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*SnapshotDoesNotExist*"])
    assert lone_suite.outcome("a") == ["new", False, None]


def make(
    path: Path,
    status: Status = "measured",
    fail: str = "nmse:5%",
    isolated: Scores | None = None,
    fallback: Scores | None = None,
) -> Score:
    """Make the score of an op ``a``."""
    return Score(
        OpResult("a", "linear", "", status, "the reason", isolated, fallback),
        thresholds=parse_fail(fail),
        path=path,
        model="minilm",
        scheme="w8a8",
        accept="pytest --snapshot-update",
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Path of a snapshot with one op ``a`` in isolated mode."""
    file = tmp_path / "w8a8.json"
    file.write_text(dumps(Snapshot("minilm", "w8a8", {}, {"a": entry(0.25, sqnr_db=6.0)})))
    return file


def accept(score: Score) -> Entry | None:
    """Judge a score and give what an update would record."""
    score.judge()
    score.accepted = True
    return score.entry


def test_one_grave_mode_decides(path: Path) -> None:
    """A mode without a record is new; if another one regressed, that is what counts, and both are recorded."""
    score = make(path, isolated={"nmse": 0.25}, fallback={"nmse": 0.5})
    assert score.judge() == Verdict("new", ("fallback nmse 0.5",))
    assert accept(score) == Entry("linear", fallback={"nmse": 0.5})
    score = make(path, isolated={"nmse": 0.5}, fallback={"nmse": 0.5})
    assert score.judge().kind == "regressed"
    assert accept(score) == Entry("linear", isolated={"nmse": 0.5}, fallback={"nmse": 0.5})


def test_a_new_metric_joins_the_recorded_ones(path: Path) -> None:
    """Recording a metric that the file lacks leaves the values it has, which a regression may hide in otherwise."""
    score = make(path, fail="nmse:5%,kl:1", isolated={"nmse": 0.2501, "sqnr_db": 5.9, "kl": 0.125})
    assert accept(score) == Entry("linear", isolated={"nmse": 0.25, "sqnr_db": 6.0, "kl": 0.125})


def test_an_op_of_another_type_is_new(path: Path) -> None:
    """Scores of a convolution say nothing about the linear that took its name: they are replaced, once accepted."""
    path.write_text(path.read_text().replace("linear", "conv1d"))
    score = make(path, isolated={"nmse": 0.25})
    assert score.judge() == Verdict("new", ("recorded as conv1d, but it is linear", "isolated nmse 0.25"))
    assert accept(score) == Entry("linear", isolated={"nmse": 0.25})


def test_gating_only_what_was_not_measured_is_an_error(path: Path) -> None:
    """A gate that compares nothing would pass for ever; the metrics to choose from are listed."""
    with pytest.raises(QsensError, match=r"a: none of the gated metrics \(kl\) was measured. Gate on some of nmse"):
        make(path, fail="kl:1", isolated={"nmse": 0.25}).judge()


@pytest.mark.parametrize("status", ["unexercised", "unquantizable", "failed", "unrun"])
def test_an_op_without_a_score_cannot_be_compared(path: Path, status: Status) -> None:
    """There is no number to compare, so comparing says what happened to the op."""
    with pytest.raises(QsensError, match=rf"a has no score to compare: it is {status} \(the reason\)\."):
        make(path, status).judge()


def test_the_snapshot_of_another_model_is_refused(path: Path) -> None:
    """A file copied from another model is named, not compared with."""
    path.write_text(path.read_text().replace("minilm", "bert"))
    with pytest.raises(QsensError, match="is the snapshot of model 'bert', not 'minilm'"):
        make(path, isolated={"nmse": 0.25}).judge()


def test_scores_compare_by_value_with_each_other(path: Path) -> None:
    """Apart from syrupy's fixture a score equals a score of the same result, and nothing else."""
    score = make(path, isolated={"nmse": 0.25})
    assert score == make(path, isolated={"nmse": 0.25})
    assert score != make(path, isolated={"nmse": 0.5})
    assert score != 0.25
    assert repr(score) == "<Score of a: isolated nmse 0.25>"
    assert repr(make(path, "failed")) == "<Score of a: failed>"


def test_other_comparisons_are_not_explained(path: Path) -> None:
    """Failures that have nothing to do with snapshots are left to pytest."""
    score = make(path, isolated={"nmse": 0.25})
    assert explain("==", score, score) is None
    assert explain("==", 1, 2) is None


def test_syrupy_finds_nothing_of_ours_to_clean_up(tmp_path: Path) -> None:
    """Whatever syrupy asks the extension outside a comparison, there is nothing unused and nothing is deleted."""
    file = tmp_path / "w8a8.json"
    file.write_text("{}")
    extension = ScoreExtension()
    assert list(extension.discover_snapshots()) == []
    assert not extension.read_snapshot_collection(snapshot_location=str(file)).has_snapshots
    extension.delete_snapshots(snapshot_location=str(file), snapshot_names={"a"})
    extension.write_snapshot_collection()
    assert file.read_text() == "{}"
