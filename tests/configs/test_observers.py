"""Which observers and smoothing files of tools mean, and what is told of those that mean something else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig

from pytest_qsens.configs.read import read_config
from pytest_qsens.configs.write import write_config
from pytest_qsens.errors import QsensError
from pytest_qsens.ops import Op
from pytest_qsens.quant.op_scheme import named
from tests.configs.ops import NET, complaints, says, write

if TYPE_CHECKING:
    from pathlib import Path

LINEAR = [op for op in NET if op.type == "linear"]
WEIGHT = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
STATIC = {**WEIGHT, "strategy": "tensor"}


def compressed(**inputs: object) -> dict[str, Any]:
    """Return a config with an observer of static inputs."""
    group = {"targets": ["Linear"], "weights": WEIGHT, "input_activations": {**STATIC, **inputs}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}}


@pytest.mark.parametrize(
    ("inputs", "scheme", "problem"),
    [
        ({}, "w8a8_static_act_sym_moving_average", None),  # as llm-compressor does
        ({"observer": "static_minmax"}, "w8a8_static_act_sym_minmax", None),
        ({"observer": "minmax"}, "w8a8_static_act_sym_moving_average", None),
        (
            {"observer": "minmax", "observer_kwargs": {"averaging_constant": 0.01}},
            "w8a8_static_act_sym_moving_average",
            None,
        ),
        (
            {"observer": "minmax", "observer_kwargs": {"averaging_constant": 0.5}},
            "w8a8_static_act_sym_moving_average",
            "'observer_kwargs': {\"averaging_constant\": 0.5} changes numbers",
        ),
        (
            {"observer": "mse"},
            "w8a8_static_act_sym_mse",
            "'mse' changes numbers and is not simulated: it takes a moving",
        ),
        ({"observer": "memoryless_minmax"}, "w8a8_static_act_sym_minmax", "the extremes of the last batch"),
        ({"observer": "minmax", "dynamic": True, "strategy": "token"}, "w8a8_dynamic", None),
        ({"observer": "mse", "dynamic": True, "strategy": "token"}, "w8a8_dynamic", "'mse' changes numbers"),
    ],
)
def test_compressed_tensors(tmp_path: Path, inputs: dict[str, object], scheme: str, problem: str | None) -> None:
    """Extremes of all batches and their moving average are ours; all else is told, and dynamic scales need none."""
    path = write(tmp_path / "config.json", compressed(**inputs))
    assert set(says(path, LINEAR).values()) == {scheme}
    found = complaints(path, LINEAR)
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_compressed_tensors_parses_what_is_written() -> None:
    """Its own class takes the observers."""
    assignment = {"fc1": "w8a8_static_act_sym_minmax", "fc2": "fp8_static_moving_average"}
    ops = [Op(name, "linear") for name in assignment]
    text = write_config({op: named(name, "x") for op, name in assignment.items()}, ops, "compressed-tensors")
    inside = json.loads(text)["quantization_config"]
    config = QuantizationConfig.model_validate(inside)
    found = [group.input_activations for group in config.config_groups.values() if not isinstance(group, list)]
    assert all(isinstance(arguments, QuantizationArgs) for arguments in found)
    assert {arguments.observer for arguments in found if arguments is not None} == {"static_minmax", "minmax"}


RECIPE = """\
quant_stage:
  quant_modifiers:
    QuantizationModifier:
      targets: [Linear]
      ignore: [lm_head]
      scheme: FP8
"""


@pytest.mark.parametrize(
    ("more", "scheme", "problems"),
    [
        ("", "fp8_static_tensor", []),
        ("      input_observer: static_minmax\n", "fp8_static_tensor", []),
        ("      input_observer: minmax\n", "fp8_static_tensor_moving_average", []),
        ("      observer: {weights: memoryless_minmax, input: MinMax}\n", "fp8_static_tensor_moving_average", []),
        ("      input_observer: minmax\n      observer: {input: static_minmax}\n", "fp8_static_tensor", []),
        ("      weight_observer: mse\n", "fp8_static_tensor", ["'weight_observer': 'mse' changes numbers"]),
        ("      input_observer: mse\n", "fp8_static_tensor_mse", ["'input_observer': 'mse' changes numbers"]),
        (
            "      output_observer: minmax\n",
            "fp8_static_tensor",
            ["'output_observer': outputs are observed in"],
        ),
    ],
)
def test_llm_compressor(tmp_path: Path, more: str, scheme: str, problems: list[str]) -> None:
    """What a modifier says takes precedence over its scheme's own observers."""
    path = write(tmp_path / "recipe.yaml", RECIPE + more)
    assert says(path, LINEAR)["fc1"] == scheme
    found = complaints(path, LINEAR)
    assert len(found) == len(problems)
    assert all(problem in text for problem, text in zip(problems, found, strict=True))


@pytest.mark.parametrize(("name", "problems"), [("static_minmax", 0), ("minmax", 1)])
def test_scales_of_tensors_beside_local_ones(tmp_path: Path, name: str, problems: int) -> None:
    """They are those of the extremes of all batches; a moving average of them is told, in both files."""
    recipe = RECIPE.replace("scheme: FP8", "scheme: NVFP4") + f"      input_observer: {name}\n"
    path = write(tmp_path / "recipe.yaml", recipe)
    assert says(path, LINEAR)["fc1"] == "nvfp4_local"
    assert len(complaints(path, LINEAR)) == problems
    nvfp4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    inputs = {**nvfp4, "dynamic": "local", "observer": name}
    group = {"targets": ["Linear"], "weights": nvfp4, "input_activations": inputs}
    path = write(tmp_path / "config.json", {"config_groups": {"group_0": group}})
    assert says(path, LINEAR)["fc1"] == "nvfp4_local"
    assert len(complaints(path, LINEAR)) == problems


@pytest.mark.parametrize(
    ("entry", "scheme"),
    [
        ({"activation": {"algorithm": ["minmax"]}}, "w8a8_minmax"),
        ({"activation": {"algorithm": ["kl"], "scheme": ["sym"]}}, "w8a8_act_sym"),
        ({"activation": {"algorithm": ["minmax"], "scheme": ["sym"]}}, "w8a8_act_sym_minmax"),
    ],
)
def test_neural_compressor(tmp_path: Path, entry: dict[str, Any], scheme: str) -> None:
    """``kl`` is torch's histogram, in all of its files."""
    path = write(tmp_path / "ptq.json", {"op_name_dict": {"fc1(.module)?": entry}})
    assert says(path, LINEAR)["fc1"] == scheme
    assert complaints(path, LINEAR) == []
    algorithm = entry["activation"]["algorithm"][0]
    qconfig = {"w_dtype": "int8", "w_granularity": "per_channel", "act_dtype": "uint8", "act_granularity": "per_tensor"}
    qconfig |= {"act_algo": algorithm, "act_sym": "sym" in scheme}  # type: ignore[dict-item]
    path = write(tmp_path / "qconfig.json", {"('fc1', 'Linear')": {"static_quant": qconfig}})
    assert says(path, LINEAR[:1]) == {"fc1": scheme}
    assert complaints(path, LINEAR[:1]) == []


INT8 = [
    {"quantizer_name": "*", "enable": False},
    {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
    {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
    {"quantizer_name": "*lm_head*", "enable": False},
]
"""Of ``INT8_DEFAULT_CFG`` and ``INT8_SMOOTHQUANT_CFG``."""


@pytest.mark.parametrize(
    ("algorithm", "scheme"),
    [
        ({}, "w8a8_static_act_sym_minmax"),  # ``max`` is its default
        ({"algorithm": "max"}, "w8a8_static_act_sym_minmax"),
        ({"algorithm": {"method": "max"}}, "w8a8_static_act_sym_minmax"),
        ({"algorithm": "smoothquant"}, "w8a8_static_act_sym_minmax_smoothquant1_unshared"),
        ({"algorithm": {"method": "smoothquant", "alpha": 0.5}}, "w8a8_static_act_sym_minmax_smoothquant_unshared"),
    ],
)
def test_modelopt(tmp_path: Path, algorithm: dict[str, object], scheme: str) -> None:
    """Largest magnitudes, and SmoothQuant of each linear layer by itself, as it does it: see ``test_smoothing``."""
    path = write(tmp_path / "int8.json", {"quant_cfg": INT8, **algorithm})
    ops = [*LINEAR, Op("conv", "conv2d")]
    assert says(path, ops) == {
        "fc1": scheme,
        "fc2": scheme,
        "lm_head": "unquantized",
        "conv": scheme.partition("_smoothquant")[0],
    }
    assert complaints(path, ops) == []


def test_modelopts_other_algorithms_are_told(tmp_path: Path) -> None:
    """And a strength that it does not take is refused."""
    (found,) = complaints(write(tmp_path / "a.json", {"quant_cfg": INT8, "algorithm": "awq_lite"}), LINEAR)
    assert found == "'algorithm': 'awq_lite' changes numbers and is not simulated: 'max' and 'smoothquant' are"
    bad = {"quant_cfg": INT8, "algorithm": {"method": "smoothquant", "alpha": 2}}
    with pytest.raises(QsensError, match="'alpha': 2 is not possible"):
        read_config(write(tmp_path / "b.json", bad))


@pytest.mark.parametrize(
    ("arguments", "scheme", "problem"),
    [
        ({"calibrate_method": "MinMax"}, "w8a8_tensor_minmax", None),
        ({"calibrate_method": "CalibrationMethod.Percentile"}, "w8a8_tensor_percentile99.999", None),
        (
            {"calibrate_method": "Percentile", "extra_options": {"CalibPercentile": 99.99}},
            "w8a8_tensor_percentile",
            None,
        ),
        (
            {"calibrate_method": "Percentile", "extra_options": {"CalibPercentile": 99.9999999991}},
            "w8a8_tensor_percentile99.999999999",
            None,
        ),
        ({"calibrate_method": "Entropy"}, "w8a8_tensor_minmax", "it compares no thresholds"),
        ({"calibrate_method": "Distribution"}, "w8a8_tensor_minmax", "the mean and the deviation"),
        (
            {"calibrate_method": "MinMax", "extra_options": {"CalibMovingAverage": True}},
            "w8a8_tensor_minmax",
            "'CalibMovingAverage': true changes numbers",
        ),
        ({"per_channel": True}, "w8a8_minmax", None),  # `quantize_static`'s default,
    ],
)
def test_onnx_runtime(tmp_path: Path, arguments: dict[str, object], scheme: str, problem: str | None) -> None:
    """Extremes and percentiles are ours."""
    path = write(tmp_path / "ort.json", {"nodes_to_exclude": ["/lm_head/MatMul"], **arguments})
    assert says(path, LINEAR) == {"fc1": scheme, "fc2": scheme, "lm_head": "unquantized"}
    found = complaints(path, LINEAR)
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]
    with pytest.raises(QsensError, match="'calibrate_method': 'Best' is not one of MinMax, Percentile"):
        read_config(write(tmp_path / "bad.json", {"nodes_to_exclude": [], "calibrate_method": "Best"}))


@pytest.mark.parametrize("share", [100, 99.9999999999, 49])
def test_percentiles_that_cannot_be(tmp_path: Path, share: float) -> None:
    """Also one that is 100 with as many digits as a name has."""
    options = {"calibrate_method": "Percentile", "extra_options": {"CalibPercentile": share}}
    with pytest.raises(QsensError, match=r"'CalibPercentile': \d+ is not possible, from 50 to below 100 is"):
        read_config(write(tmp_path / "ort.json", {"nodes_to_exclude": [], **options}))
