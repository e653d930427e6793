"""Products of two activations on the command line: tests, snapshots, configs, reports, and what refuses them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from pytest_qsens.cli import main
from tests.plugin.harness import MODEL as WITHOUT
from tests.plugin.harness import write_model
from tests.plugin.test_keys_and_values import measured
from tests.plugin.test_keys_and_values import run as run_attending

if TYPE_CHECKING:
    import pytest

PRODUCTS = tuple(f"blocks.{i}:{kind}" for i in range(2) for kind in ("qk", "pv"))
SCHEME = "bmm_int4_dynamic"


def test_a_scheme_of_products_has_their_tests(pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]) -> None:
    """One for each; accepted, they are gated as layers are, and what is of layers refuses their results."""
    arguments = ("--qsens-scheme", SCHEME, "--qsens-json", "out.json")
    result = run_attending(pytester, *arguments, "--snapshot-update")
    result.assert_outcomes(passed=len(PRODUCTS) + 1)
    assert set(measured(pytester)) == {*PRODUCTS, "total"}
    assert all(nmse > 0 for nmse in measured(pytester).values())

    again = run_attending(pytester, "--qsens-scheme", SCHEME, "--qsens-ops", "*:pv", "--qsens-json", "again.json")
    again.assert_outcomes(passed=2)
    snapshot = next(pytester.path.rglob(f"{SCHEME}.json"))
    snapshot.write_text(re.sub(r'("blocks.0:pv".*?"nmse": )[^,]+', r"\g<1>1e-9", snapshot.read_text()))
    worse = run_attending(pytester, "--qsens-scheme", SCHEME, "--qsens-ops", "*:pv")
    worse.assert_outcomes(passed=1, failed=1)
    worse.stdout.fnmatch_lines(["*FAILED*blocks.0:pv*"])

    capsys.readouterr()
    assert main(["diff", "out.json", "again.json"]) == 0
    assert "blocks.0:qk" in capsys.readouterr().out
    for command, message in (
        (["plan", "out.json", "--budget-bits", "6", "--out", "p.yaml"], f"{SCHEME}, of products of two activations"),
        (["proxies", "out.json", "--model", "attending:spec"], "quantizes products of two activations, and proxies"),
        (
            ["inspect", "out.json", "blocks.0:qk", "--model", "attending:spec"],
            "blocks.0:qk is a product of two activations (qk)",
        ),
    ):
        assert main(command) == 4
        assert message in capsys.readouterr().err


def test_a_config_has_some(pytester: pytest.Pytester) -> None:
    """A glob of names gives them a scheme; others are no ops, and told as products that nothing quantizes."""
    rules = [{"ops": "*:qk", "scheme": "bmm_fp8"}, {"ops": "blocks.1.*", "scheme": "w8a8_dynamic"}]
    (pytester.path / "quant.json").write_text(json.dumps({"schema": 1, "rules": rules}))
    arguments = ("--qsens-config", "quant.json", "--qsens-json", "out.json")
    result = run_attending(pytester, *arguments, "--snapshot-update")
    result.assert_outcomes(passed=5)
    assert set(measured(pytester)) == {"blocks.0:qk", "blocks.1:qk", "blocks.1.qkv", "blocks.1.out", "total"}
    result.stdout.fnmatch_lines(["*2 functional products not quantized by quant*"])
    entries = {entry["op"]: entry for entry in json.loads((pytester.path / "out.json").read_text())["ops"]}
    assert {op: entries[op]["status"] for op in PRODUCTS} == {
        op: "measured" if op.endswith(":qk") else "unquantizable" for op in PRODUCTS
    }


def test_models_and_engines_without_any_are_refused(pytester: pytest.Pytester) -> None:
    """The message says what was looked for, or which engine to take."""
    write_model(pytester)
    result = pytester.runpytest_inprocess("--qsens-model", WITHOUT, "--qsens-scheme", "bmm_fp8")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*'bmm_fp8' quantizes products of two activations, and net.spec has no module*"])
    result = run_attending(pytester, "--qsens-scheme", "bmm_fp8", "--qsens-engine", "probe")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*engine probe estimates what rounding one input does, and blocks.0:qk has two*"])
    assert not list(pytester.path.rglob("bmm_fp8.json"))
