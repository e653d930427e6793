"""Schemes by their canonical names, from the command line to the snapshot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.plugin.harness import MODEL, OPS, snapshot_file, write_model

if TYPE_CHECKING:
    import pytest


def test_a_scheme_that_is_not_in_the_list(pytester: pytest.Pytester) -> None:
    """It has a snapshot by its name, and what it leaves as it is is told op by op."""
    write_model(pytester)
    arguments = ("--qsens-model", MODEL, "--qsens-scheme", "w3a16_g32", "-p", "no:randomly")
    first = pytester.runpytest_inprocess(*arguments, "--snapshot-update", "--qsens-json", "r.json")
    assert first.ret == 0, first.stdout.str()
    found = json.loads((pytester.path / "r.json").read_text())
    assert found["run"]["scheme"] == "w3a16_g32"
    reasons = {op["op"]: op["reason"] for op in found["ops"] if op["status"] == "unquantizable"}
    measured = {op["op"] for op in found["ops"] if op["status"] == "measured"}
    assert measured == {op for op in OPS if op.endswith("down")}
    assert reasons.keys() == set(OPS) - measured
    assert reasons["embed"] == "w3a16_g32 leaves embeddings as they are: they are int8, or not quantized"
    assert reasons["head"].endswith("a scale per 32 input features, and 16 of them cannot be divided by 32")
    assert json.loads(snapshot_file(pytester, "w3a16_g32").read_text())["ops"].keys() == measured
    assert pytester.runpytest_inprocess(*arguments).ret == 0
