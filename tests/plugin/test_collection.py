"""The built-in suite behaves like any other tests: ids, selection, ordering, reports."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest

from tests.plugin.harness import LABEL, MODEL, OPS, TOTAL_ID, collected, op_id, write_model

if TYPE_CHECKING:
    from collections.abc import Sequence

ALL_IDS = [*map(op_id, OPS), TOTAL_ID]


def collect(pytester: pytest.Pytester, *args: str) -> list[str]:
    """Node ids that a run with these arguments would run."""
    return collected(pytester.runpytest_inprocess("--qsens-model", MODEL, "--collect-only", "-q", *args))


def test_one_item_per_op_in_a_directory_without_tests(pytester: pytest.Pytester) -> None:
    """Every op is one item with its full name in the id, in model order, then the whole model."""
    write_model(pytester)
    assert collect(pytester) == ALL_IDS


def test_collecting_builds_the_model_on_the_meta_device_only(pytester: pytest.Pytester) -> None:
    """``--collect-only`` loads no weights."""
    write_model(pytester)
    assert collect(pytester)
    assert set((pytester.path / "built.log").read_text().split()) == {"meta"}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["-k", "blocks.1"], [op_id("blocks.1.up"), op_id("blocks.1.down")]),
        (["-k", "total"], [TOTAL_ID]),
        (["-k", "not qsens"], []),
        (["-m", "qsens and not slow"], ALL_IDS),
        (["-m", "not qsens"], []),
        (["--deselect", op_id("head"), "--deselect", "qsens::test_total"], [op_id(op) for op in OPS[:-1]]),
        (["--qsens-ops", "*.up"], [op_id(f"blocks.{n}.up") for n in range(3)]),
        (["--qsens-ops", "head", "--qsens-ops", "total"], [op_id("head"), TOTAL_ID]),
        (["--qsens-ops", "total"], [TOTAL_ID]),
        (["--qsens-max-ops", "2"], [op_id("embed"), op_id("blocks.0.up")]),
        ([op_id("head")], [op_id("head")]),
        ([op_id("head"), TOTAL_ID], [op_id("head"), TOTAL_ID]),
        (["qsens::test_op"], [op_id(op) for op in OPS]),
        (["qsens"], ALL_IDS),
    ],
)
def test_selection(pytester: pytest.Pytester, args: Sequence[str], expected: Sequence[str]) -> None:
    """``-k``, ``-m``, ``--deselect``, our own restrictions and node ids select as they do for other tests."""
    write_model(pytester)
    pytester.makeini("[pytest]\nmarkers = slow")
    assert collect(pytester, *args) == list(expected)


def test_node_ids_collect_nothing_else(pytester: pytest.Pytester) -> None:
    """With only node ids of the suite on the command line, test files are left alone, as for other node ids."""
    write_model(pytester)
    pytester.makepyfile(test_other="raise RuntimeError('imported')")
    assert collect(pytester, op_id("head")) == [op_id("head")]


def test_node_ids_and_files_add_up(pytester: pytest.Pytester) -> None:
    """Node ids of the suite and paths can be given together."""
    write_model(pytester)
    pytester.makepyfile(test_other="def test_it(): pass", test_third="def test_it(): pass")
    assert collect(pytester, "test_other.py", op_id("head")) == ["test_other.py::test_it", op_id("head")]


def test_a_directory_called_qsens_is_collected(pytester: pytest.Pytester) -> None:
    """A project may have a directory of the suite's name: it is meant by its name, and node ids still work."""
    write_model(pytester)
    pytester.mkdir("qsens")
    (pytester.path / "qsens" / "test_in_it.py").write_text("def test_it(): pass")
    assert collect(pytester, "qsens")[0] == "qsens/test_in_it.py::test_it"
    assert collect(pytester, op_id("head")) == [op_id("head")]


def test_items_join_those_of_test_files(pytester: pytest.Pytester) -> None:
    """Test files beside are collected as ever, before the suite."""
    write_model(pytester)
    pytester.makepyfile(test_other="def test_it(): pass")
    assert collect(pytester) == ["test_other.py::test_it", *ALL_IDS]


def test_prefixes_of_test_functions_are_the_users_business(pytester: pytest.Pytester) -> None:
    """The suite is found whatever ``python_functions`` is set to."""
    write_model(pytester)
    pytester.makeini("[pytest]\npython_functions = check_*\ncollect_imported_tests = false")
    assert collect(pytester) == ALL_IDS


def test_model_in_the_ini_file(pytester: pytest.Pytester) -> None:
    """A model in the ini file adds the suite to whole runs, and leaves a run of named files alone."""
    write_model(pytester)
    pytester.makeini(f"[pytest]\nqsens_model = {MODEL}\nqsens_ops =\n    head\n    *.up")
    pytester.makepyfile(test_other="def test_it(): pass")
    suite = [*(op_id(f"blocks.{n}.up") for n in range(3)), op_id("head")]

    def ids(*args: str) -> list[str]:
        return collected(pytester.runpytest_inprocess("--collect-only", "-q", *args))

    assert ids() == ["test_other.py::test_it", *suite]
    assert ids(".") == ["test_other.py::test_it", *suite]
    assert ids("test_other.py") == ["test_other.py::test_it"]
    assert ids(op_id("head")) == [op_id("head")]


def test_invocation_from_a_subdirectory(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node ids do not depend on where pytest is started; a model's relative path does."""
    pytester.makeini("[pytest]")
    pytester.mkdir("sub")
    write_model(pytester)
    (pytester.path / "net.py").rename(pytester.path / "sub" / "net.py")
    monkeypatch.chdir(pytester.path / "sub")
    assert collect(pytester) == ALL_IDS
    assert collect(pytester, op_id("head")) == [op_id("head")]
    printed = pytester.runpytest_inprocess("--qsens-model", MODEL, "-rf", "--qsens-ops", "head").stdout.str()
    assert f"FAILED ../{op_id('head')}" in printed
    assert collect(pytester, f"../{op_id('head')}") == [op_id("head")]
    assert collect(pytester, "../qsens::test_total") == [TOTAL_ID]
    assert collect(pytester, "../qsens") == ALL_IDS


ODD = """
import torch
from pytest_qsens import ModelSpec

NAMES = ["bl\u00f6ck.b", "a b[x]-c::d/e", "plain-w8a8-1"]

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.add_module("bl\u00f6ck", torch.nn.ModuleDict({"b": torch.nn.Linear(4, 4)}))
        for name in NAMES[1:]:
            self.add_module(name, torch.nn.Linear(4, 4))
    def forward(self, x):
        for name in NAMES:
            x = self.get_submodule(name)(x)
        return x

def spec():
    batches = [{"x": torch.arange(8.0).reshape(2, 4)}]
    return ModelSpec(Net(), batches, batches, output=lambda out, batch: out)
"""
ODD_NAMES = {"bl\u00f6ck.b": "bl\\xf6ck.b", "a b[x]-c::d/e": "a b[x]-c::d/e", "plain-w8a8-1": "plain-w8a8-1"}
"""Names of its ops, and how pytest spells them in node ids."""


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(pytester: pytest.Pytester, name: str) -> None:
    """Any name selects its op: with ``-k``, ``--qsens-ops`` and as a node id, as written and as pytest prints it."""
    pytester.makepyfile(odd=ODD)

    def ids(*args: str) -> list[str]:
        run = ("--qsens-model", "odd:spec", "--collect-only", "-q")
        return collected(pytester.runpytest_inprocess(*run, *args))

    printed = f"qsens::test_op[odd.spec-w8a8-{ODD_NAMES[name]}]"
    assert printed in ids()
    assert ids("--qsens-ops", name) == [printed]
    assert ids(f"qsens::test_op[odd.spec-w8a8-{name}]") == [printed]
    assert ids(printed) == [printed]
    assert ids("-k", name.partition(" ")[0].partition("[")[0]) == [printed] or name.startswith("a")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_crash_in_an_op_of_an_odd_name(pytester: pytest.Pytester, name: str) -> None:
    """A worker that dies costs the op it was measuring, whatever that is called."""
    pytester.makepyfile(odd=ODD)
    pytester.makeconftest(
        f"""
        import os, signal
        def pytest_runtest_call(item):
            if getattr(item, "callspec").params.get("qsens_op", item).name == {name!r}:
                os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    run = ("--qsens-model", "odd:spec", "-n", "2", "--snapshot-update", "--qsens-json", "out.json")
    pytester.runpytest_inprocess(*run).assert_outcomes(passed=3, failed=1)
    statuses = {op["op"]: op["status"] for op in json.loads((pytester.path / "out.json").read_text())["ops"]}
    assert statuses == {other: "failed" if other == name else "measured" for other in ODD_NAMES}


def test_hooks_and_fixtures_of_the_root_conftest_apply(pytester: pytest.Pytester) -> None:
    """The suite belongs to the root directory: its conftest's hooks and autouse fixtures apply, no other's do."""
    write_model(pytester)
    pytester.makeconftest(
        """
        import pytest
        @pytest.fixture(autouse=True)
        def around(): print("AROUND")
        def pytest_runtest_setup(item): print("SETUP " + item.nodeid)
        def pytest_itemcollected(item): item.user_properties.append(("seen", "yes"))
        """
    )
    pytester.mkdir("other")
    (pytester.path / "other" / "conftest.py").write_text("def pytest_runtest_setup(item): raise ValueError(item)")
    (pytester.path / "other" / "test_it.py").write_text("")
    for args in ([], [op_id("head")]):
        result = pytester.runpytest_inprocess(
            "--qsens-model", MODEL, "--qsens-ops", "head", "-s", "--snapshot-update", "--junitxml=out.xml", *args
        )
        result.assert_outcomes(passed=1)
        result.stdout.fnmatch_lines([f"*SETUP {op_id('head')}*", "*AROUND*"])
        assert 'name="seen" value="yes"' in (pytester.path / "out.xml").read_text()


def test_last_failed(pytester: pytest.Pytester) -> None:
    """``--lf`` runs what failed and nothing else, in the suite and in files at once; ``--ff`` runs it first."""
    write_model(pytester)
    pytester.makepyfile(test_a="def test_good(): pass\ndef test_bad(): assert False", test_b="def test_good(): pass")
    run = ("--qsens-model", MODEL)
    pytester.runpytest_inprocess(*run, "--snapshot-update").assert_outcomes(passed=len(ALL_IDS) + 2, failed=1)
    (pytester.path / "worse").write_text("30")
    result = pytester.runpytest_inprocess(*run, "--lf")
    result.assert_outcomes(failed=1)  # the suite was green: only the file's failure is run again
    result = pytester.runpytest_inprocess(*run)
    outcomes = result.parseoutcomes()
    assert outcomes["failed"] >= 2
    result = pytester.runpytest_inprocess(*run, "--lf", "-v")
    result.assert_outcomes(failed=outcomes["failed"])
    result.stdout.fnmatch_lines([f"*{op_id('blocks.1.down').replace('[', '[[]')} FAILED*"])
    result.stdout.no_fnmatch_line("*test_good*")
    first = collected(pytester.runpytest_inprocess(*run, "--ff", "--collect-only", "-q"))
    assert "test_a.py::test_bad" in first[: outcomes["failed"]]
    assert op_id("blocks.1.down") in first[: outcomes["failed"]]


def test_stop_at_the_first_failure(pytester: pytest.Pytester) -> None:
    """``-x`` stops after one failed op."""
    write_model(pytester)
    pytester.runpytest_inprocess("--qsens-model", MODEL, "-x").assert_outcomes(failed=1)


def test_junit(pytester: pytest.Pytester) -> None:
    """JUnit files name the op and carry its status and scores as properties."""
    write_model(pytester)
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--junitxml=out.xml", "--snapshot-update", "--qsens-ops=head")
    case = ET.parse(pytester.path / "out.xml").find(".//testcase")
    assert case is not None
    assert (case.get("classname"), case.get("name")) == ("qsens", f"test_op[{LABEL}-w8a8-head]")
    properties = {p.get("name"): p.get("value") for p in case.iter("property")}
    assert properties["status"] == "measured"
    assert 0 < float(str(properties["nmse"])) < 1
    assert float(str(properties["sqnr_db"])) > 0


@pytest.mark.parametrize("absent", ["cacheprovider", "terminal", "xdist", "randomly"])
def test_without_other_plugins(pytester: pytest.Pytester, absent: str) -> None:
    """No plugin but syrupy is needed."""
    write_model(pytester)
    run = ("--qsens-model", MODEL, "-p", f"no:{absent}")
    assert pytester.runpytest_inprocess(*run, "--snapshot-update").ret == pytest.ExitCode.OK
    assert pytester.runpytest_inprocess(*run).ret == pytest.ExitCode.OK
    assert pytester.runpytest_inprocess(*run, op_id("head")).ret == pytest.ExitCode.OK
