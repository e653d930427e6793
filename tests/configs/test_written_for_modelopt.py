"""ModelOpt quantizes the ops that the files written for it name, and no others, and errs as our simulation does."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from pytest_qsens.configs.write import write_config
from pytest_qsens.quant.op_scheme import named
from tests.configs.test_written_for_tools import IDS, OPS, Net, assigned, nmse, simulated
from tests.installed import required

pytestmark = pytest.mark.filterwarnings("ignore")  # its own, of torch and transformers

AGREEMENT = {
    "w8a16": 0.15,  # its integers are from -127 on, and a scale is the largest value by 127 where ours is by 127.5
    "w4a16_g32": 0.02,
    "w8a8_static_act_sym_minmax": 0.05,
    "w8a8_dynamic": 0.1,
    "fp8_static_tensor": 1e-4,
    "fp8_dynamic": 1e-4,
    "wfp8a16": 1e-4,
}
"""Schemes that it has on a CPU → how far its error may be from that of our simulation, relatively."""


@pytest.mark.parametrize("scheme", AGREEMENT)
def test_quant_cfg(scheme: str) -> None:
    """``mtq.quantize`` switches on the quantizers of the ops that are quantized, and no others."""
    mtq = required("modelopt.torch.quantization")
    names = ["layers.0", "lm_head"]
    config = yaml.safe_load(write_config(assigned(named(scheme, "here"), names), OPS, "modelopt-quant-cfg"))
    net, reference = Net().eval(), Net().eval()
    with torch.no_grad():
        mtq.quantize(net, config, lambda model: model(IDS))
        found = nmse(net(IDS), reference(IDS))
    enabled = [name for name, module in net.named_modules() if getattr(module, "is_enabled", False)]
    weights = {name.removesuffix(".weight_quantizer") for name in enabled if name.endswith(".weight_quantizer")}
    inputs = {name.removesuffix(".input_quantizer") for name in enabled if name.endswith(".input_quantizer")}
    assert weights == set(names)
    assert inputs == (set(names) if named(scheme, "here").activation is not None else set())
    assert len(enabled) == len(weights) + len(inputs)
    assert found == pytest.approx(simulated(names, scheme), rel=AGREEMENT[scheme])


def test_disabled_layers() -> None:
    """AutoQuantize leaves the ops alone that are listed, and searches all others."""
    mtq = required("modelopt.torch.quantization")
    kept = ["layers.1", "lm_head"]
    quantized = [op.name for op in OPS if op.type == "linear" and op.name not in kept]
    text = write_config(assigned(named("fp8_dynamic", "here"), quantized), OPS, "modelopt-disabled-layers")
    disabled = yaml.safe_load(text)
    disabled = disabled["disabled_layers"] if isinstance(disabled, dict) else disabled
    _, state = mtq.auto_quantize(
        Net(),
        constraints={"effective_bits": 12.0},
        quantization_formats=[mtq.FP8_DEFAULT_CFG],
        data_loader=[IDS, IDS],
        forward_step=lambda model, ids: model(ids),
        loss_func=lambda output, _: output.square().mean(),
        disabled_layers=disabled,
        num_calib_steps=2,
        num_score_steps=2,
        verbose=False,
    )
    stats = state["candidate_stats"].items()
    assert {name.removesuffix(".quant_recipe") for name, each in stats if len(each["formats"]) > 1} == set(quantized)


@pytest.mark.parametrize(
    ("scheme", "bits", "kind"), [("fp8_static_tensor", 8, "float"), ("nvfp4_local", 4, "float"), ("w8a16", 8, "int")]
)
def test_hf_quant_config(scheme: str, bits: int, kind: str) -> None:
    """What it makes of ``hf_quant_config.json`` for ``config.json`` has the scheme and what is left out."""
    convert = required("modelopt.torch.export.convert_hf_config").convert_hf_quant_config_format
    names = ["layers.0", "layers.1", "layers.2"]
    found = convert(json.loads(write_config(assigned(named(scheme, "here"), names), OPS, "modelopt")))
    assert found["ignore"] == ["lm_head"]
    if scheme == "w8a16":  # it has no groups for this one
        assert found["quant_algo"] == "W8A16"
        return
    (group,) = found["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["type"]) == (bits, kind)
    assert group["targets"] == ["Linear"]
