"""From a config to what is measured, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_qsens.configs.gate import ConfigRequest, assign
from pytest_qsens.errors import QsensError
from pytest_qsens.ops import Op

if TYPE_CHECKING:
    from pathlib import Path

OPS = (Op("wide", "linear", features=256), Op("narrow", "linear", features=192), Op("head", "linear", features=256))


def test_a_group_that_does_not_divide_a_layer(tmp_path: Path) -> None:
    """It is told before anything is loaded, or the op is left out by name; the same of what would be added."""
    path = tmp_path / "quant.yaml"
    path.write_text("{schema: 1, rules: [{ops: head, scheme: unquantized}, {ops: '*', scheme: w4a16_g128}]}")
    with pytest.raises(QsensError, match=r"(?s)narrow is quantized as 'w4a16_g128'.*192 of them cannot be divided"):
        assign(ConfigRequest(str(path)), OPS)
    found = assign(ConfigRequest(str(path), strict=False, down="w4a16_g32"), OPS).assignment
    assert found.unsimulated == ["narrow"]
    assert {op: scheme.name for op, scheme in found.schemes.items()} == {"wide": "w4a16_g128", "head": "w4a16_g32"}
    assert found.added == {"head"}
    down = assign(
        ConfigRequest(str(path), strict=False, down="w4a16_g64"), [*OPS[:2], Op("head", "linear", features=96)]
    )
    assert down.assignment.added == frozenset()
    assert down.assignment.left_out["head"][0] == "unquantized"


def test_a_rule_that_others_go_before(tmp_path: Path) -> None:
    """It holds for no op, which nobody means; a rule for the rest, or one that says the same, is no mistake."""
    path = tmp_path / "quant.yaml"
    rules = "{ops: ['*e*', narrow], scheme: w8a8}, {ops: head, scheme: unquantized}, {ops: '*', scheme: w4a16_g32}"
    path.write_text(f"{{schema: 1, rules: [{rules}, {{ops: wide, scheme: w8a8}}]}}")
    told = (
        r"'rule 2: head' \(unquantized\) holds for no op: head is matched by it, and decided by rules that go before "
        r"it, 'rule 1: \*e\*' \(w8a8\) for one\. Put it before them"
    )
    with pytest.raises(QsensError, match=r"(?s)something is wrong with the config .*" + told):
        assign(ConfigRequest(str(path)), OPS)
    found = assign(ConfigRequest(str(path), strict=False), OPS)
    assert len(found.problems) == 1
    assert set(found.assignment.schemes) == {op.name for op in OPS}
    path.write_text(f"{{schema: 1, rules: [{{ops: head, scheme: unquantized}}, {rules}]}}")
    assert assign(ConfigRequest(str(path)), OPS).problems == ()
