"""Configs that quantize products of two activations: our own format names them, others leave them as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_qsens import QsensError
from pytest_qsens.cli import main
from pytest_qsens.configs.read import read_config
from pytest_qsens.configs.simulated import EMBEDDING
from pytest_qsens.configs.write import TARGETS, write_config
from pytest_qsens.ops import Op
from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, named
from pytest_qsens.result_files import write as dump
from pytest_qsens.results import Cost, OpResult, RunInfo, RunResult
from tests.configs.ops import complaints, says, write
from tests.configs.test_keys_and_values import follows_schema

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("a.q_proj", "a.o_proj", "a:q", "a:k", "a:v", "a:qk", "a:pv", "head:matmul", "head:matmul_1")
OPS = [Op(name, name.partition(":")[2].partition("_")[0] or "linear", elements=0, features=64) for name in NAMES]
PRODUCTS = ("a:qk", "a:pv", "head:matmul", "head:matmul_1")


def test_rules_mean_layers_or_products(tmp_path: Path) -> None:
    """A scheme is of one kind of op, and a glob means only those that its scheme is of."""
    rules = [
        {"ops": "*:qk", "scheme": "bmm_fp8"},
        {"ops": "*:matmul_1", "scheme": "unquantized"},
        {"ops": "*", "types": ["matmul", "linear"], "scheme": "bmm_int8_dynamic"},
        {"ops": "*", "scheme": "kv_fp8"},
        {"ops": "*", "scheme": "w8a8"},
    ]
    path = write(tmp_path / "a.json", {"schema": 1, "rules": rules})
    found = says(path, OPS)
    assert [found[name] for name in PRODUCTS] == ["bmm_fp8", "unquantized", "bmm_int8_dynamic", "unquantized"]
    assert [found[name] for name in NAMES[:5]] == ["w8a8", "w8a8", "unquantized", "kv_fp8", "kv_fp8"]
    assert complaints(path, OPS) == []
    assert follows_schema({"schema": 1, "rules": rules})


def test_schemes_of_ones_own(tmp_path: Path) -> None:
    """A scheme can be an object; with nothing beside, and only of what can be said of factors."""
    entry = {"products": {"dtype": "int8", "kind": "static", "symmetric": False, "observer": "moving_average"}}
    content = {"schema": 1, "schemes": {"mine": entry}, "rules": [{"ops": "*:pv", "scheme": "mine"}]}
    path = write(tmp_path / "a.json", content)
    assert says(path, OPS)["a:pv"] == "bmm_int8_asym_moving_average"
    assert follows_schema(content)
    for other in ({"weight": {"dtype": "int8"}}, {"cache": {"dtype": "int8", "kind": "static"}}):
        content["schemes"] = {"mine": entry | other}
        assert not follows_schema(content)
        with pytest.raises(QsensError, match="goes with nothing else"):
            read_config(write(tmp_path / "b.json", content))


def test_what_cannot_be_simulated_is_told(tmp_path: Path) -> None:
    """A rule can say what nothing simulates."""
    path = write(tmp_path / "a.json", {"schema": 1, "rules": [{"ops": "*:pv", "scheme": "bmm_nvfp4_local"}]})
    (told,) = complaints(path, OPS)
    assert "a:pv is quantized as 'bmm_nvfp4_local', which cannot be simulated: factors of products are nvfp4" in told


def test_our_own_format_says_it(tmp_path: Path) -> None:
    """What is written is read back; with layers and caches beside, or without."""
    schemes = ("w8a8", None, None, "kv_fp8", "kv_fp8", "bmm_fp8", "bmm_int8_dynamic", None, "bmm_fp8")
    for chosen in (schemes, tuple(name if name and name.startswith("bmm") else None for name in schemes)):
        assignment = {
            op.name: None if name is None else named(name, "test") for op, name in zip(OPS, chosen, strict=True)
        }
        path = tmp_path / "a.yaml"
        path.write_text(write_config(assignment, OPS))
        assert says(path, OPS) == {name: scheme or "unquantized" for name, scheme in zip(NAMES, chosen, strict=True)}


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_others_say_nothing_of_them(target: str) -> None:
    """They are refused by name, and left out where they are not quantized, which reads the same."""
    assignment: dict[str, OpScheme | None] = {op.name: None for op in OPS}
    assignment["a:qk"] = OpScheme(None, products=ActivationScheme("fp8_e4m3", "static", "tensor"))
    if target != "qsens":
        with pytest.raises(QsensError, match="says nothing of products of two activations") as error:
            write_config(assignment, OPS, target)
        assert "qsens can say all that is asked for" in str(error.value)
    assignment["a:qk"] = None
    assignment["a.q_proj"] = named("w8a8_minmax", "test")
    if target in ("qsens", "neural-compressor", "neural-compressor-qconfig", "onnxruntime"):
        text = write_config(assignment, OPS, target)
        assert "a:qk" not in text
        assert "matmul" not in text
    assert EMBEDDING.of_layers


@pytest.mark.parametrize("enable", [True, False])
def test_quantizers_of_modelopt_are_of_none(enable: bool, tmp_path: Path) -> None:
    """Its wildcards for everything mean layers, and what attention is given."""
    entries = [
        {"quantizer_name": "*", "enable": enable},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8}},
    ]
    path = write(tmp_path / "a.json", {"quant_cfg": entries, "algorithm": "max"})
    config = read_config(path, None)
    assert [config.decide(op).scheme for op in OPS if op.name in PRODUCTS] == [None] * 4
    assert config.decide(OPS[0]).scheme is not None


def test_results_that_list_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is said of products would be missing; those that nothing measured may be called otherwise when they are."""
    ops = [OpResult(op.name, op.type, "a", "unquantizable", "why") for op in OPS if op.name in PRODUCTS]
    measured = {"nmse": 0.1, "sse": 1.0, "mse": 0.1, "sqnr_db": 10.0}
    layer = OpResult("a.q_proj", "linear", "a", "measured", isolated=measured, weights=64)
    config = write(tmp_path / "a.json", {"schema": 1, "rules": [{"ops": "*:qk", "scheme": "bmm_fp8"}]})
    result = tmp_path / "out.json"
    total = OpResult("total", "total", "", "measured", isolated=measured)
    dump(result, RunResult(RunInfo("m", "w8a8", "delta", "isolated", {}, Cost(1.0)), (layer, *ops), total))
    out = ["--to", "qsens", "--out", str(tmp_path / "b.json")]
    assert main(["config", str(config), "--ops-from", str(result), *out]) == 4
    assert "quantizes products of two activations as bmm_fp8, and" in capsys.readouterr().err
