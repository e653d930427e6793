"""What is written in float formats is what torchao holds and multiplies, bit for bit, and errs as the simulation does.

On a CPU torchao runs weight-only configs as they are, and MX formats with its emulated products. Of the others it
refuses the machine; here it is told that the machine will do, so that its own quantizers and tensors run all the same:
products per tensor and per row are then torch's own on a CPU, and what has no kernel there, NVFP4 and blocks of
128 x 128, is multiplied as torchao's tensors stand for it.
"""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from pytest_qsens.calibrated import calibrate
from pytest_qsens.configs.write import write_config
from pytest_qsens.errors import QsensError
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.ops import Op
from pytest_qsens.quant.formats import round_input, round_weight
from pytest_qsens.quant.op_scheme import named
from tests.configs.ops import complaints, says, write
from tests.configs.test_real_matching import kind_of, tool

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

core, quantization = tool("torchao.core.config"), tool("torchao.quantization")
mx = tool("torchao.prototype.mx_formats")
EMULATED = tool("torchao.quantization.quantize_.common.kernel_preference").KernelPreference.EMULATED
pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own

_FLOAT8 = "torchao.quantization.quantize_.workflows.float8.float8_tensor"
_NVFP4 = "torchao.prototype.mx_formats.nvfp4_tensor"


class Net(nn.Module):
    """An embedding, three layers, a head, of sizes that differ and that all formats take; weights are bf16's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 256)
        self.layers = nn.ModuleList([nn.Linear(256, 256) for _ in range(3)])
        self.lm_head = nn.Linear(256, 128, bias=False)
        self.bfloat16().float()

    def forward(self, ids: Tensor) -> Tensor:
        """Run it."""
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        found: Tensor = self.lm_head(x)
        return found


OPS = list_ops(Net())
IDS = torch.arange(32).reshape(2, 16)
SOME = ["layers.0", "layers.2", "lm_head"]


def output_of(net: nn.Module) -> Tensor:
    """Run it without gradients."""
    with torch.no_grad():
        found: Tensor = net(IDS)
    return found.double()


def nmse(found: Tensor) -> float:
    """Error of an output, against the network that is not quantized."""
    expected = output_of(Net())
    return float((found - expected).square().sum() / expected.square().sum())


def simulated(scheme: str, names: Collection[str]) -> float:
    """Score of these ops quantized together, as a run measures it."""
    spec = ModelSpec(Net(), [{"ids": IDS}], [{"ids": IDS}], lambda output, _: output)
    members = tuple(op for op in OPS if op.name in names)
    measured = calibrate(spec, OPS, scheme).score(Op("together", "linear", members), ["isolated"])
    assert measured.isolated is not None
    found = measured.isolated["nmse"]
    assert found is not None
    return found


def config_for(scheme: str, names: Collection[str]) -> Any:  # noqa: ANN401 - torchao's own
    """Write a config for these ops, and let torchao parse it; products of MX formats are emulated."""
    text = write_config({op.name: named(scheme, "here") if op.name in names else None for op in OPS}, OPS, "torchao")
    config = core.config_from_dict(json.loads(text))
    for each in config.fqn_to_config.values():
        if isinstance(each, mx.MXDynamicActivationMXWeightConfig):
            each.kernel_preference = EMULATED
        elif isinstance(each, mx.NVFP4DynamicActivationNVFP4WeightConfig):
            each.use_triton_kernel = False
    return config


def as_it_is(_: pytest.MonkeyPatch) -> None:
    """Lift nothing."""


def any_machine(patch: pytest.MonkeyPatch) -> None:
    """Let float8 and NVFP4 pass the check of the machine."""
    patch.setattr("torchao.float8.inference.is_MI300", lambda: True)
    patch.setattr("torchao.float8.inference.is_sm_at_least_89", lambda: True)
    patch.setattr("torchao.prototype.mx_formats.inference_workflow.is_sm_at_least_100", lambda: True)


def nvfp4_products(patch: pytest.MonkeyPatch) -> None:
    """Multiply what two tensors of NVFP4 stand for."""

    def multiply(a: Any, b: Any, _: object, bias: Tensor | None = None) -> Tensor:  # noqa: ANN401 - NVFP4Tensor
        found: Tensor = a.dequantize() @ b.dequantize()
        return found if bias is None else found + bias

    any_machine(patch)
    patch.setattr(sys.modules[_NVFP4], "_addmm_nvfp4_dispatch", multiply)


def block_products(patch: pytest.MonkeyPatch) -> None:
    """Multiply codes times scales, in place of torchao's Triton kernel."""

    def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, block_size: int) -> Tensor:
        wide = a.float() * a_scale.view(len(a), -1).repeat_interleave(block_size, -1)  # one column, in this order
        blocks = b_scale.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
        return wide @ (b.float() * blocks).t()

    any_machine(patch)
    patch.setattr(sys.modules[_FLOAT8], "blockwise_fp8_gemm", multiply)


SCHEMES: dict[str, tuple[torch.dtype, Callable[[pytest.MonkeyPatch], None]]] = {
    "wfp8a16": (torch.float32, as_it_is),
    "wfp8a16_tensor": (torch.float32, as_it_is),
    "wfp8a16_g64": (torch.float32, as_it_is),
    "wnvfp4a16": (torch.float32, as_it_is),
    "mxfp8_dynamic": (torch.bfloat16, as_it_is),
    "mxfp4_dynamic": (torch.bfloat16, as_it_is),
    "mxfp8_dynamic_rceil": (torch.bfloat16, as_it_is),
    "mxfp4_dynamic_rceil": (torch.bfloat16, as_it_is),
    "mxfp4_dynamic_ceil": (torch.bfloat16, as_it_is),
    "mxfp4_dynamic_even": (torch.bfloat16, as_it_is),
    "fp8_dynamic_tensor_act_tensor": (torch.float32, any_machine),
    "fp8_dynamic": (torch.bfloat16, any_machine),
    "fp8_dynamic_block128x128_act_g128": (torch.float32, block_products),
    "nvfp4_dynamic": (torch.float32, nvfp4_products),
}
"""Written scheme → dtype of weights that torchao takes, and what is lifted so that it runs on a CPU."""


def quantized(scheme: str, names: Collection[str]) -> nn.Module:
    """Let torchao quantize weights of the dtype that it takes, and reckon with all else in fp32."""
    net = Net().to(SCHEMES[scheme][0]).eval()
    quantization.quantize_(net, config_for(scheme, names), filter_fn=None)
    for owner, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kept: Any = parameter
            if kind_of(parameter) == "Parameter":
                kept = nn.Parameter(parameter.float(), requires_grad=False)
            elif kind_of(parameter) == "MXTensor":
                kept.orig_dtype = torch.float32  # of products
            elif kept.dtype == torch.bfloat16:  # Float8Tensor's scales of bf16 are bf16's, see below
                again = type(kept).from_hp(
                    Net().get_submodule(owner).weight.detach(),  # type: ignore[operator,union-attr]
                    granularity=kept.act_quant_kwargs.granularity,
                    mm_config=kept.mm_config,
                    act_quant_kwargs=kept.act_quant_kwargs,
                )
                kept = nn.Parameter(again, requires_grad=False)
            setattr(module, name, kept)
    return net


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Every tensor that torchao quantizes from now on, and what becomes of it."""
    found: list[tuple[Tensor, Tensor]] = []
    modules = [(_FLOAT8, "Float8Tensor", "from_hp"), (_NVFP4, "NVFP4Tensor", "to_nvfp4")]
    modules.append(("torchao.prototype.mx_formats.mx_tensor", "MXTensor", "to_mx"))
    for module, cls, method in modules:
        kind = getattr(sys.modules[module], cls)
        monkeypatch.setattr(kind, method, staticmethod(_kept(getattr(kind, method), found)))
    return found


def _kept(whole: Callable[..., Any], found: list[tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    def quantize(x: Tensor, *args: Any, **more: Any) -> Any:  # noqa: ANN401 - passed on
        made = whole(x, *args, **more)
        found.append((x, made.dequantize(torch.float32)))
        return made

    return quantize


@pytest.mark.parametrize("names", [["layers.1"], SOME], ids=["one", "three"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_torchao_holds_and_errs_as_simulated(
    scheme: str, names: list[str], inputs: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and inputs in low precision are equal, every one; the whole model's error is, but for orders of sums.

    In a later layer these make a value fall on the other side of a tie, now and then.
    """
    SCHEMES[scheme][1](monkeypatch)
    net, parts = quantized(scheme, names), named(scheme, "here")
    assert {op.name for op in OPS if kind_of(net.get_submodule(op.name).weight) != "Parameter"} == set(names)
    assert parts.weight is not None
    for name in names:
        weight: Any = net.get_submodule(name).weight
        own = round_weight(Net().get_submodule(name).weight.detach(), parts.weight).real()  # type: ignore[operator,union-attr,arg-type]
        assert torch.equal(weight.dequantize(torch.float32), own), name
    inputs.clear()
    found = nmse(output_of(net))
    assert len(inputs) == (0 if parts.activation is None else len(names))
    for x, held in inputs:
        assert parts.activation is not None
        assert torch.equal(held, round_input(x.float(), parts.activation))
    assert found == pytest.approx(simulated(scheme, names), rel=1e-4 if len(names) == 1 else 3e-3)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if "block" not in name])  # that product is in fp32
def test_in_bf16_only_bf16_is_added(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As such models are run, all in bf16: the error is that of the simulation and that of bf16, at most twice."""
    SCHEMES[scheme][1](monkeypatch)
    net = Net().bfloat16().eval()
    quantization.quantize_(net, config_for(scheme, SOME), filter_fn=None)
    added = nmse(output_of(Net().bfloat16())) ** 0.5
    assert nmse(output_of(net)) ** 0.5 == pytest.approx(simulated(scheme, SOME) ** 0.5, abs=2 * added)


@pytest.mark.parametrize("scheme", ["mxfp8_dynamic", "fp8_dynamic"])
def test_what_torchao_takes_in_bf16_alone(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what the documentation says of weights in fp32."""
    SCHEMES[scheme][1](monkeypatch)
    with pytest.raises(AssertionError, match=r"bf16|bfloat16"):
        quantization.quantize_(Net(), config_for(scheme, SOME), filter_fn=None)


def test_scales_of_float8_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel in torch divides in the dtype of the model, so that scales of bf16 models have bf16's 8 bits."""
    any_machine(monkeypatch)
    net = Net().bfloat16()
    quantization.quantize_(net, config_for("fp8_dynamic", SOME), filter_fn=None)
    largest = Net().lm_head.weight.abs().amax(1, keepdim=True)
    weight: Any = net.lm_head.weight
    assert torch.equal(weight.scale, (largest / 448).bfloat16().float())
    assert not torch.equal(weight.scale, largest / 448)


def config_of(path: Path, config: object) -> Path:
    """Let torchao write a config."""
    return write(path / "config.json", core.config_to_dict(config))


def test_modes_of_scales_are_read(tmp_path: Path) -> None:
    """Its own mode is RCEIL, and none is taken for another."""
    made = mx.MXDynamicActivationMXWeightConfig
    assert says(config_of(tmp_path, made()), OPS)["lm_head"] == "mxfp8_dynamic_rceil"
    for mode, name in {"FLOOR": "", "RCEIL": "_rceil", "CEIL": "_ceil", "EVEN": "_even"}.items():
        fp4 = torch.float4_e2m1fn_x2
        config = made(activation_dtype=fp4, weight_dtype=fp4, scaling_mode=getattr(mx.ScaleCalculationMode, mode))
        path = config_of(tmp_path, config)
        assert (says(path, OPS)["lm_head"], complaints(path, OPS)) == (f"mxfp4_dynamic{name}", [])
    text = path.read_text().replace("EVEN", "ROUND")
    with pytest.raises(QsensError, match=r"'scaling_mode': 'ROUND' is no way of torchao"):
        says(write(path, text), OPS)
    with pytest.raises(QsensError, match=r"fp4_e2m1 and fp8_e4m3 differ\. torchao takes one dtype for both"):
        says(
            write(path, path.read_text().replace("float4_e2m1fn_x2", "float8_e4m3fn", 1).replace("ROUND", "EVEN")), OPS
        )


def test_nvfp4_that_is_observed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps with calibration between them are `nvfp4_local`, and err as it."""
    nvfp4_products(monkeypatch)
    net = Net().eval()
    for step in ("prepare", "convert"):
        config = mx.NVFP4DynamicActivationNVFP4WeightConfig(step=step, use_triton_kernel=False)
        path = config_of(tmp_path, config)
        assert (says(path, OPS)["lm_head"], complaints(path, OPS)) == ("nvfp4_local", [])
        quantization.quantize_(net, config, filter_fn=lambda _, name: name in SOME)
        output_of(net)
    assert nmse(output_of(net)) == pytest.approx(simulated("nvfp4_local", SOME), rel=1e-4)


def test_what_changes_numbers_is_told(tmp_path: Path) -> None:
    """Scales of NVFP4 without that of the tensor, sparse weights, and those that another library quantizes."""
    of_tensor = "'use_dynamic_per_tensor_scale': false changes numbers and is not simulated: scales of blocks are E4M3"
    for config in (mx.NVFP4WeightOnlyConfig, mx.NVFP4DynamicActivationNVFP4WeightConfig):
        told = complaints(config_of(tmp_path, config(use_dynamic_per_tensor_scale=False)), OPS)
        assert told == [f"'_data', {of_tensor} with no scale of the tensor above them"]
        assert complaints(config_of(tmp_path, config()), OPS) == []
    sparse = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow(), packing_format="sparse_2d_data_2d_metadata"
    )
    assert "2 of 4 weights are kept" in complaints(config_of(tmp_path, sparse), OPS)[0]
    told = complaints(config_of(tmp_path, quantization.Float8DynamicActivationInt4WeightConfig()), OPS)
    assert len(told) == 1
    assert "preshuffled changes numbers and is not simulated: weights are quantized by MSLK, with scales" in told[0]


def test_packed_int4_is_told(tmp_path: Path) -> None:
    """Its zero points are no integers; texts say the same as members of enums do."""
    packings = tool("torchao.quantization.quantize_.workflows").Int4PackingFormat
    for packing in [*packings, *(each.value for each in packings)]:
        path = config_of(tmp_path, quantization.Int4WeightOnlyConfig(group_size=64, int4_packing_format=packing))
        assert says(path, OPS)["lm_head"] == "w4a16_g64_asym"
        told = complaints(path, OPS)
        assert len(told) == (packing != packings.PLAIN_INT32), packing
        assert all("zero points are no integers" in text for text in told)
    hqq = quantization.Int4WeightOnlyConfig(
        int4_packing_format="tile_packed_to_4d", int4_choose_qparams_algorithm="hqq"
    )
    assert any("hqq changes numbers" in text for text in complaints(config_of(tmp_path, hqq), OPS))
    path = config_of(tmp_path, quantization.Int4WeightOnlyConfig(int4_packing_format="loose"))
    with pytest.raises(QsensError, match="'loose' is no packing format of torchao"):
        says(path, OPS)


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_how_much_packed_int4_differs(size: int) -> None:
    """What is told of it: of normally distributed weights its error is within 10 %, of others it is not."""
    primitives, block = tool("torchao.quantization.quant_primitives"), (1, size)
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(256, 1024, generator=draw)
    scheme = named(f"w4a16_g{size}_asym", "").weight
    assert scheme is not None
    ratios = []
    for weight in (normal, normal * normal.abs(), normal.abs() + 1):
        scale, zero = primitives._choose_qparams_affine_tinygemm(
            weight, primitives.MappingType.ASYMMETRIC, block, torch.int32, 0, 15
        )
        codes = primitives._quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, 0, 15)
        found = primitives._dequantize_affine_tinygemm(codes, block, scale, zero, torch.int32, 0, 15)
        theirs, ours = ((each - weight).square().sum() for each in (found, round_weight(weight, scheme).real()))
        ratios.append(float(theirs / ours))
    assert 0.9 < ratios[0] < 1
    assert ratios[1] > 1.1
    assert ratios[2] < 0.9


def test_symmetric_inputs_that_torchao_refuses(tmp_path: Path) -> None:
    """A config that torchao takes, and fails on once it quantizes, is told."""
    symmetric = tool("torchao.quantization.quant_primitives").MappingType.SYMMETRIC
    config = quantization.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, act_mapping_type=symmetric)
    with pytest.raises(AssertionError):
        quantization.quantize_(Net(), config)
    assert complaints(config_of(tmp_path, config), OPS) == [
        "'_data', 'act_mapping_type': torchao fails on it once it quantizes. Write ASYMMETRIC"
    ]


class Sizes(nn.Module):
    """Layers of sizes that some kernels do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.usual = nn.Linear(256, 128)
        self.odd = nn.Linear(256, 2)
        self.narrow = nn.Linear(256, 48)
        self.square = nn.Linear(128, 128)


NOT_TAKEN = {
    "fp8_dynamic": {"odd": "torchao leaves weights unquantized, without a word, whose sizes are no multiples of 16"},
    "fp8_dynamic_tensor_act_tensor": {
        "odd": "torchao leaves weights unquantized, without a word, whose sizes are no multiples of 16",
        "square": "torchao takes the scale of a weight of 128 x 128 for that of a block",
    },
    "fp8_dynamic_block128x128_act_g128": {
        "odd": "torchao refuses blocks of 128 x 128 for weights of 2 x 256",
        "narrow": "torchao refuses blocks of 128 x 128 for weights of 48 x 256",
    },
    "nvfp4_dynamic": {"odd": "torchao refuses NVFP4 for weights whose sizes are no multiples of 16"},
    "wnvfp4a16": {"odd": "torchao refuses NVFP4 for weights whose sizes are no multiples of 16"},
    "wfp8a16": {},
    "mxfp8_dynamic": {},
}
"""Scheme → which of the layers torchao does not quantize with it, and why."""


@pytest.mark.parametrize("scheme", NOT_TAKEN)
@pytest.mark.parametrize("name", ["usual", "odd", "narrow", "square"])
def test_sizes_that_torchao_does_not_take(
    scheme: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it leaves as it is, or fails on, is not written, and told of a file that says so; all else runs."""
    {"nvfp4_dynamic": nvfp4_products}.get(scheme, block_products)(monkeypatch)
    ops = [op for op in list_ops(Sizes()) if op.name == name]
    text = write_config({"usual": named(scheme, "here")}, [Op("usual", "linear")], "torchao").replace("usual", name)
    why = NOT_TAKEN[scheme].get(name)
    path = write(tmp_path / "config.json", text)
    if why is None:
        assert complaints(path, ops) == []
        write_config({name: named(scheme, "here")}, ops, "torchao")
    else:
        assert [why in told for told in complaints(path, ops)] == [True]
        with pytest.raises(QsensError, match=rf"{name} \(linear\): torchao cannot say '{scheme}': {why}"):
            write_config({name: named(scheme, "here")}, ops, "torchao")
    net: Any = Sizes().bfloat16()
    config = core.config_from_dict(json.loads(text))
    for each in config.fqn_to_config.values():
        for key, value in {"kernel_preference": EMULATED, "use_triton_kernel": False}.items():
            if hasattr(each, key) and scheme.startswith(("mx", "nv")):
                setattr(each, key, value)
    layer = net.get_submodule(name)
    try:
        quantization.quantize_(net, config, filter_fn=None)
        layer(torch.ones(16, layer.in_features, dtype=torch.bfloat16))
    except (AssertionError, RuntimeError):
        assert why is not None
        assert "without a word" not in why
    else:
        assert (kind_of(layer.weight) == "Parameter") == (why is not None)


def test_schemes_that_torchao_has_not() -> None:
    """One dtype and mode for both sides of an MX product, and none for weights alone; int4 weights are MSLK's."""
    for scheme, why in {
        "wmxfp4amxfp8_dynamic": "none of its configs rounds to these dtypes",
        "mxfp8_dynamic_rceil_act_floor": "none of its configs rounds to these dtypes",
        "wmxfp4a16": "none of its configs rounds to these dtypes",
        "w4afp8_dynamic_g128": "its config for these lets MSLK quantize weights, with scales of largest / 8, not 7.5",
    }.items():
        with pytest.raises(QsensError, match=why):
            write_config({"fc": named(scheme, "here")}, [Op("fc", "linear")], "torchao")


def test_other_formats_say_no_modes_or_have_their_own() -> None:
    """And then no other is written."""
    for scheme, target, why in (
        (
            "mxfp8_dynamic_rceil",
            "modelopt",
            "scales are found in mode rceil, which its files do not say. qsens, torchao",
        ),
        ("mxfp4_dynamic", "compressed-tensors", "it finds scales of mxfp4 in mode even (measure that to write it)"),
    ):
        with pytest.raises(QsensError, match=re.escape(why)):
            write_config({"fc": named(scheme, "here")}, [Op("fc", "linear")], target)
