"""A user's own tests take the same fixtures, and the marker chooses in code what options choose outside."""

from __future__ import annotations

import json

import pytest

from tests.plugin.harness import LABEL, MODEL, OPS, collected, op_id, snapshot_file, snapshot_ops, write_model

OWN = """
def test_own(qsens_op, qsens_score, snapshot):
    assert qsens_score.result.op == qsens_op.name
    assert qsens_score == snapshot
"""


def own_id(op: str, name: str = "test_own", scheme: str = "w8a8") -> str:
    """Node id of an op in the user's test file."""
    return f"test_user.py::{name}[{LABEL}-{scheme}-{op}]"


def test_own_tests_take_the_place_of_the_suite(pytester: pytest.Pytester) -> None:
    """With a test of the user's for the same model and scheme, the built-in items step aside; the gate works alike."""
    write_model(pytester)
    pytester.makepyfile(test_user=OWN)
    run = ("--qsens-model", MODEL)
    assert collected(pytester.runpytest_inprocess(*run, "--collect-only", "-q")) == [own_id(op) for op in OPS]
    pytester.runpytest_inprocess(*run).assert_outcomes(failed=len(OPS))
    pytester.runpytest_inprocess(*run, "--snapshot-update").assert_outcomes(passed=len(OPS))
    assert set(snapshot_ops(pytester)) == set(OPS)
    assert "total" not in json.loads(snapshot_file(pytester).read_text())
    pytester.runpytest_inprocess(*run, "-m", "qsens").assert_outcomes(passed=len(OPS))
    assert collected(pytester.runpytest_inprocess(*run, "--collect-only", "-q", op_id("head"))) == [op_id("head")]


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
            assert qsens_model.engine == "replay"

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
    result = pytester.runpytest_inprocess("--snapshot-update", "--qsens-json", "out.json")
    assert result.parseoutcomes()["passed"] == 3
    result.stdout.fnmatch_lines([f"*qsens: model {LABEL}, scheme {scheme}, *" for scheme in ("w8a8", "w8a8_dynamic")])
    result.stdout.fnmatch_lines(["qsens: *out.json was not written*one model and scheme*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    for scheme in ("w8a8", "w8a8_dynamic"):
        assert list(json.loads(snapshot_file(pytester, scheme).read_text())["ops"]) == ["head"]
    devices = (pytester.path / "built.log").read_text().split()
    assert devices.count("cpu") == 2


def test_a_failing_test_accepts_nothing(pytester: pytest.Pytester) -> None:
    """A test that fails after its comparison does not record the score."""
    write_model(pytester)
    pytester.makepyfile(test_user=OWN + "    assert qsens_op.name != 'head'\n")
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update").assert_outcomes(
        passed=len(OPS) - 1, failed=1
    )
    assert set(snapshot_ops(pytester)) == set(OPS) - {"head"}


def test_scores_can_be_asserted_on(pytester: pytest.Pytester) -> None:
    """The numbers are there without any snapshot; without a comparison nothing is recorded."""
    write_model(pytester)
    pytester.makepyfile(test_user="def test_own(qsens_score): assert qsens_score.result.isolated['nmse'] < 0.1")
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update").assert_outcomes(passed=len(OPS))
    assert not snapshot_file(pytester).exists()


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("", "qsens: no model to measure. Choose one with --qsens-model*"),
        ("model='minlm'", "qsens: no preset 'minlm' (did you mean minilm?)*"),
        ("sheme='x'", "qsens: no keyword of @pytest.mark.qsens 'sheme' (did you mean scheme?)*"),
        (f"'{MODEL}'", f"qsens: @pytest.mark.qsens takes keywords only, such as model=, not '{MODEL}'"),
        (f"model='{MODEL}', ops='haed'", "qsens: ops= of @pytest.mark.qsens 'haed' matches none of the 8 ops*"),
        (f"model='{MODEL}', scheme='w4a4'", "qsens: no value for scheme= of @pytest.mark.qsens: 'w4a4'*w8a8*"),
        (f"model='{MODEL}', max_ops=0", "qsens: max_ops= of @pytest.mark.qsens takes a whole number from 1, not 0"),
        (f"model='{MODEL}', calib='none.txt'", "qsens: *"),
    ],
)
@pytest.mark.parametrize("workers", ["0", "2"])
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
