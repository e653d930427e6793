"""A user's own tests take the same fixtures, and the marker chooses in code what options choose outside."""

from __future__ import annotations

import json

import pytest

from tests.checkpoints import bert
from tests.plugin.harness import (
    LABEL,
    MODEL,
    OPS,
    TOTAL_ID,
    collected,
    listing,
    op_id,
    snapshot_file,
    snapshot_ops,
    write_model,
)

OWN = """
def test_own(qsens_op, qsens_score, snapshot):
    assert qsens_score.result.op == qsens_op.name
    assert qsens_score == snapshot
"""


def own_id(op: str, name: str = "test_own", scheme: str = "w8a8") -> str:
    """Node id of an op in the user's test file."""
    return f"test_user.py::{name}[{LABEL}-{scheme}-{op}]"


def test_own_tests_take_the_place_of_the_suite(pytester: pytest.Pytester) -> None:
    """With a test of the user's for the same model and scheme, the built-in one steps aside; the gate works alike."""
    write_model(pytester)
    pytester.makepyfile(test_user=OWN)
    run = ("--qsens-model", MODEL)
    own = [own_id(op) for op in OPS]
    assert collected(pytester.runpytest_inprocess(*run, "--collect-only", "-q")) == [*own, TOTAL_ID]
    pytester.runpytest_inprocess(*run).assert_outcomes(failed=len(OPS) + 1)
    pytester.runpytest_inprocess(*run, "--snapshot-update").assert_outcomes(passed=len(OPS) + 1)
    assert set(snapshot_ops(pytester)) == set(OPS)
    pytester.runpytest_inprocess(*run, "-m", "qsens").assert_outcomes(passed=len(OPS) + 1)
    assert collected(pytester.runpytest_inprocess(*run, "--collect-only", "-q", op_id("head"))) == [op_id("head")]


def test_each_kind_of_own_test_replaces_its_like(pytester: pytest.Pytester) -> None:
    """The whole model stays gated beside a test of the ops, and the ops beside a test of the whole model."""
    write_model(pytester)

    def ids(source: str, *args: str) -> list[str]:
        pytester.makepyfile(test_user=source)
        return collected(pytester.runpytest_inprocess("--qsens-model", MODEL, "--collect-only", "-q", *args))

    total = "def test_all(qsens_total, snapshot): assert qsens_total == snapshot\n"
    total_id = f"test_user.py::test_all[{LABEL}-w8a8]"
    assert ids(total) == [total_id, *map(op_id, OPS)]
    assert ids(total + OWN) == [total_id, *map(own_id, OPS)]
    assert ids("def test_names(qsens_op): pass")[len(OPS) :] == [*map(op_id, OPS), TOTAL_ID]  # it gates nothing
    assert ids(OWN, "test_user.py", op_id("head")) == [*map(own_id, OPS), op_id("head")]  # asked for by name


def test_tests_of_another_scheme_leave_the_suite_alone(pytester: pytest.Pytester) -> None:
    """Only a test of the same model and scheme replaces the suite."""
    write_model(pytester)
    pytester.makepyfile(test_user=f"import pytest\n@pytest.mark.qsens(scheme='w8a8_static', ops='head')\n{OWN.strip()}")
    ids = collected(pytester.runpytest_inprocess("--qsens-model", MODEL, "--collect-only", "-q"))
    assert ids[0] == own_id("head", scheme="w8a8_static")
    assert op_id("head") in ids


def test_the_model_can_be_chosen_in_code_alone(pytester: pytest.Pytester) -> None:
    """Without any option the marker decides; markers of function, class and module add up, the closest wins."""
    write_model(pytester)
    pytester.makepyfile(
        test_user=f"""
        import pytest
        pytestmark = pytest.mark.qsens(model="{MODEL}", max_ops=3, mode="fallback")

        @pytest.mark.qsens(ops=["blocks.*", "total"])
        class TestBlocks:
            @pytest.mark.qsens(max_ops=2, fail="gain:5%")
            def test_op(self, qsens_score, snapshot):
                assert qsens_score.result.isolated is None
                assert qsens_score == snapshot

        def test_total(qsens_total, snapshot):
            assert qsens_total == snapshot

        @pytest.mark.parametrize("factor", [1, 2])
        def test_model(qsens_model, factor):
            assert qsens_model.engine == "delta"

        def test_names(qsens_op):
            assert qsens_op.type in ("linear", "embedding")

        def test_other(): pass
        """
    )
    model = f"{LABEL}-w8a8"
    assert collected(pytester.runpytest_inprocess("--collect-only", "-q")) == [
        f"test_user.py::TestBlocks::test_op[{model}-blocks.0.up]",
        f"test_user.py::TestBlocks::test_op[{model}-blocks.0.down]",
        f"test_user.py::test_total[{model}]",
        f"test_user.py::test_model[{model}-1]",
        f"test_user.py::test_model[{model}-2]",
        *(f"test_user.py::test_names[{model}-{op}]" for op in OPS[:3]),
        "test_user.py::test_other",
    ]
    result = pytester.runpytest_inprocess("--snapshot-update")
    result.assert_outcomes(passed=9)
    assert set(snapshot_ops(pytester)) == {"blocks.0.up", "blocks.0.down"}
    assert set(snapshot_ops(pytester)["blocks.0.up"]) == {"fallback", "type"}
    result = pytester.runpytest_inprocess("-n", "2", "--qsens-json", "out.json")
    result.assert_outcomes(passed=9)
    statuses = [op["status"] for op in json.loads((pytester.path / "out.json").read_text())["ops"]]
    assert statuses == ["unrun", "measured", "measured"] + ["unrun"] * 5


def test_two_models_in_one_run(pytester: pytest.Pytester) -> None:
    """Tests of two schemes share one run: each has its snapshot and its section, and is calibrated once."""
    write_model(pytester)
    pytester.makepyfile(
        test_user=f"""
        import pytest
        @pytest.mark.parametrize("repeat", [0, 1])
        @pytest.mark.qsens(model="{MODEL}", ops="head")
        def test_one(repeat, qsens_model, qsens_score, snapshot): assert qsens_score == snapshot

        @pytest.mark.qsens(model="{MODEL}", scheme="w8a8_dynamic", ops="head")
        def test_two(qsens_model, qsens_score, snapshot): assert qsens_score == snapshot
        """
    )
    result = pytester.runpytest_inprocess("--snapshot-update")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines([f"*qsens: model {LABEL}, scheme {scheme}, *" for scheme in ("w8a8", "w8a8_dynamic")])
    for scheme in ("w8a8", "w8a8_dynamic"):
        assert list(json.loads(snapshot_file(pytester, scheme).read_text())["ops"]) == ["head"]
    devices = (pytester.path / "built.log").read_text().split()
    assert devices.count("cpu") == 2


def test_a_failing_test_accepts_nothing(pytester: pytest.Pytester) -> None:
    """A test that fails after its comparison does not record the score."""
    write_model(pytester)
    pytester.makepyfile(test_user=OWN + "    assert qsens_op.name != 'head'\n")
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update").assert_outcomes(passed=len(OPS), failed=1)
    assert set(snapshot_ops(pytester)) == set(OPS) - {"head"}


def test_scores_can_be_asserted_on(pytester: pytest.Pytester) -> None:
    """The numbers are there without any snapshot; without a comparison nothing is recorded or called new."""
    write_model(pytester)
    pytester.makepyfile(
        test_user=f"""
        import pytest
        @pytest.mark.qsens(model="{MODEL}")
        def test_own(qsens_score): assert qsens_score.result.isolated["nmse"] < 0.1
        """
    )
    for args in ([], ["--snapshot-update"]):
        result = pytester.runpytest_inprocess(*args)
        result.assert_outcomes(passed=len(OPS))
        result.stdout.fnmatch_lines([f"{len(OPS)} ops: {len(OPS)} measured"])
        result.stdout.no_fnmatch_line("*accept with*")
    assert not snapshot_file(pytester).exists()


TWO = """
import pytest
@pytest.mark.qsens({one}, max_ops=1)
def test_one(qsens_score, snapshot): assert qsens_score == snapshot

@pytest.mark.qsens({two}, max_ops=1)
def test_two(qsens_score, snapshot): assert qsens_score == snapshot
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_one_snapshot_belongs_to_one_model(pytester: pytest.Pytester, workers: str) -> None:
    """Two tests whose scores would share a snapshot but are of different models or engines are refused, both named."""
    write_model(pytester)
    pytester.makepyfile(
        test_user=TWO.format(one=f"model='{MODEL}', engine='replay'", two=f"model='{MODEL}', engine='eager'")
    )
    before = listing(pytester)
    result = pytester.runpytest_inprocess("--snapshot-update", "-n", workers)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    shared = f"qsens: two tests would be compared with one snapshot, {snapshot_file(pytester)}, "
    result.stdout.fnmatch_lines([f"{shared}*engine 'replay' and 'eager'*"])
    assert "Traceback" not in result.stdout.str()
    assert listing(pytester) == before


def test_directories_of_one_name(pytester: pytest.Pytester) -> None:
    """Two checkpoints in directories of the same name would share a snapshot: refused, with both paths."""
    for parent in ("a", "b"):
        bert(pytester.mkdir(parent) / "model")
    pytester.makepyfile(test_user=TWO.format(one="model='./a/model'", two="model='./b/model'"))
    result = pytester.runpytest_inprocess("--collect-only")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines([f"qsens: *model '{pytester.path}/a/model' and '{pytester.path}/b/model'*"])


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("late", ["scheme='w8a8_dynamic'", "ops='head'", "max_ops=1", "engine='eager'"])
def test_a_marker_on_a_single_parameter_is_too_late(pytester: pytest.Pytester, late: str, workers: str) -> None:
    """The model and its ops are settled for a whole test function: a marker that differs stops the run."""
    write_model(pytester)
    pytester.makepyfile(
        test_user=f"""
        import pytest
        @pytest.mark.parametrize("m", [pytest.param(0, marks=pytest.mark.qsens({late})), 1])
        @pytest.mark.qsens(model="{MODEL}", max_ops=3)
        def test_own(m, qsens_score, snapshot): assert qsens_score == snapshot
        """
    )
    before = listing(pytester)
    result = pytester.runpytest_inprocess("--snapshot-update", "-n", workers)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: qsens: test_user.py::test_own*put it on the function, class or module"])
    assert listing(pytester) == before


def test_what_a_single_parameter_can_choose(pytester: pytest.Pytester) -> None:
    """Mode and thresholds may differ between parameters: they change neither the model nor the list of ops."""
    write_model(pytester)
    pytester.makepyfile(
        test_user=f"""
        import pytest
        late = pytest.param("fallback", marks=pytest.mark.qsens(mode="fallback"))
        @pytest.mark.parametrize("mode", [late, "isolated"])
        @pytest.mark.qsens(model="{MODEL}", ops="head", mode="isolated")
        def test_own(mode, qsens_score, snapshot):
            assert list(qsens_score.result.modes) == [mode]
            assert qsens_score == snapshot
        """
    )
    pytester.runpytest_inprocess("--snapshot-update").assert_outcomes(passed=2)
    assert set(snapshot_ops(pytester)["head"]) == {"fallback", "isolated", "type"}


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_result_file_of_two_models_is_refused(pytester: pytest.Pytester, workers: str) -> None:
    """``--qsens-json`` holds one model and scheme: two are refused before anything is measured, one can be named."""
    write_model(pytester)
    pytester.makepyfile(test_user=TWO.format(one=f"model='{MODEL}'", two=f"model='{MODEL}', scheme='w8a8_dynamic'"))
    before = listing(pytester)
    json_and_update = ("--qsens-json", "out.json", "--snapshot-update", "-n", workers)
    result = pytester.runpytest_inprocess(*json_and_update)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    names = f"{LABEL} w8a8, {LABEL} w8a8_dynamic"
    result.stderr.fnmatch_lines([f"ERROR: qsens: *out.json cannot be written: *this run has {names}. Select*"])
    assert result.stderr.str().count("ERROR: qsens:") == 1
    assert listing(pytester) == before
    pytester.runpytest_inprocess(*json_and_update, "-k", "test_two").assert_outcomes(passed=1)
    assert json.loads((pytester.path / "out.json").read_text())["run"]["scheme"] == "w8a8_dynamic"
    pytester.runpytest_inprocess(*json_and_update, "--qsens-model", MODEL).assert_outcomes(passed=3)
    assert json.loads((pytester.path / "out.json").read_text())["run"]["scheme"] == "w8a8"


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("", "qsens: no model to measure. Choose one with --qsens-model*"),
        ("model='minlm'", "qsens: no preset 'minlm' (did you mean minilm?)*"),
        ("sheme='x'", "qsens: no keyword of @pytest.mark.qsens 'sheme' (did you mean scheme?)*"),
        (f"'{MODEL}'", f"qsens: @pytest.mark.qsens takes keywords only, such as model=, not '{MODEL}'"),
        (f"model='{MODEL}', ops='haed'", "qsens: ops= of @pytest.mark.qsens 'haed' matches none of the 8 ops*"),
        (
            f"model='{MODEL}', scheme='w4a4'",
            "qsens: no value for scheme= of @pytest.mark.qsens: 'w4a4'*are int4*w8a8*",
        ),
        (f"model='{MODEL}', max_ops=0", "qsens: max_ops= of @pytest.mark.qsens takes a whole number from 1, not 0"),
        (f"model='{MODEL}', calib='none.txt'", "qsens: *"),
    ],
)
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_wrong_marker_is_a_usage_error(pytester: pytest.Pytester, marker: str, message: str, workers: str) -> None:
    """A marker that cannot be met fails the collection without a traceback, with exit code 4, in workers too."""
    write_model(pytester)
    pytester.makepyfile(test_user=f"import pytest\n@pytest.mark.qsens({marker})\n{OWN.strip()}")
    result = pytester.runpytest_inprocess("-n", workers)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines([message])
    assert "Traceback" not in result.stdout.str()


def test_fixtures_asked_for_while_running(pytester: pytest.Pytester) -> None:
    """Which ops there are is decided at collection; asking later fails and says so."""
    write_model(pytester)
    pytester.makepyfile(test_user="def test_own(request): request.getfixturevalue('qsens_score')")
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, "test_user.py::test_own")
    result.stdout.fnmatch_lines(
        ["*qsens: qsens_model is one item for each op or model, which is decided at collection*"]
    )
    assert result.parseoutcomes()["failed"] >= 1


def test_the_score_must_be_on_the_left(pytester: pytest.Pytester) -> None:
    """The other way round syrupy would store an amber snapshot: it fails with what to write, and stores nothing."""
    write_model(pytester)
    pytester.makepyfile(test_user="def test_own(qsens_score, snapshot): assert snapshot == qsens_score")
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update", "--qsens-ops", "head")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*write `assert score == snapshot`*"])
    assert not list(pytester.path.rglob("*.ambr"))
