"""SmoothQuant's scales are those of Intel Neural Compressor, and so are the layers that its configs smooth."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from neural_compressor import PostTrainingQuantConfig, quantization
from neural_compressor.adaptor.torch_utils.waq import TorchSmoothQuant
from neural_compressor.adaptor.torch_utils.waq.utils import cal_scale
from torch import Tensor, nn

from pytest_qsens.configs.gate import ConfigRequest, assign
from pytest_qsens.graph.calls import Call
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.preparation import observe_all
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.simulate import Simulator
from pytest_qsens.quant.smoothing import smoothing_scale
from tests.configs.ops import complaints, says, write

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # its own, of torch

IDS = torch.arange(16)
OFF = {"activation": {"dtype": ["fp32"]}, "weight": {"dtype": ["fp32"]}}


class Net(nn.Module):
    """Two layers read a norm, which in the second form a residual connection reads, too."""

    def __init__(self, *, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.embed = nn.Embedding(16, 32)
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply what both give, and go through the others."""
        x = self.norm(self.embed(x))
        found: Tensor = self.out(self.q(x) * self.k(x).sigmoid())
        if self.residual:
            found = found + x
        output: Tensor = self.fc2(self.fc1(found).relu())
        return output


def seeded(**options: bool) -> Net:
    """Build the same model each time, with an outlier channel."""
    torch.manual_seed(0)
    net: Net = Net(**options).eval().requires_grad_(requires_grad=False)
    net.norm.weight[3] = 20
    return net


def simulated(path: Path, net: Net) -> tuple[Calibration, Simulator]:
    """Calibrate what a config says, on the data that Neural Compressor is given."""
    schemes = assign(ConfigRequest(str(path)), list_ops(net)).assignment.schemes
    calibration = Calibration(schemes)
    batches = [{"x": IDS[:8]}, {"x": IDS[8:]}]
    spec = ModelSpec(net, batches, batches, lambda output, _: output)
    with torch.no_grad():
        observe_all(net, batches, spec, calibration)
    return calibration, Simulator(schemes, calibration)


def fitted(net: Net, config: dict[str, Any]) -> Any:  # noqa: ANN401 - a model of theirs
    """Give a config to ``quantization.fit``."""
    loader = torch.utils.data.DataLoader([(IDS[:8], 0), (IDS[8:], 0)])  # type: ignore[arg-type,var-annotated]
    return quantization.fit(net, PostTrainingQuantConfig(**json.loads(json.dumps(config))), calib_dataloader=loader)


BY_NAME = {"q": 0.3, "k": 0.3, "out": 0.4, "fc1": 0.6, "fc2": 0.7}


@pytest.mark.parametrize(
    ("options", "config", "told"),
    [
        ({}, {}, None),
        ({"alpha": 0.7}, {"op_name_dict": {"fc2(.module)?": OFF}}, None),
        ({"alpha": BY_NAME, "folding": False}, {}, None),
        ({"alpha": [0.25]}, {}, None),
        ({"alpha": [0.25, 0.5]}, {}, "'alpha': [0.25, 0.5]: Neural Compressor tries one after the other"),
    ],
)
def test_configs_mean_what_a_run_makes_of_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    config: dict[str, Any],
    told: str | None,
) -> None:
    """The same layers have the same scales and steps, and give the same; embeddings are left alone."""
    monkeypatch.chdir(tmp_path)  # it writes logs where it is
    config = {"approach": "static", "recipes": {"smooth_quant": True, "smooth_quant_args": options}, **config}
    path = write(tmp_path / "smooth.json", config)
    net, ops = seeded(), list_ops(seeded())
    problems = [problem for problem in complaints(path, ops) if told is None or told not in problem]
    assert problems == [] if told is None else len(complaints(path, ops)) == 1
    if told is not None:
        return
    model = fitted(net, config)
    calibration, simulator = simulated(path, seeded())
    found = {name: module for name, module in model.model.named_modules() if hasattr(module, "sq_linear")}
    rounded = {name for name, module in found.items() if type(module.sq_linear).__name__ == "QDQLinear"}
    assert rounded == {op for op, scheme in says(path, ops).items() if scheme != "unquantized"}
    assert len(rounded) == (4 if "op_name_dict" in config else 5)
    exact, x = seeded(), IDS
    for name in rounded:
        scale = calibration.smoothing(name)
        assert scale is not None
        fires = found[name].input_scale < 9e4  # else it has 1e-5 there, and 1 here
        assert bool(fires.all()) == (name != "fc2")
        torch.testing.assert_close(scale[fires], 1 / found[name].input_scale[fires], rtol=1e-5, atol=0)
        qparams = calibration.input_qparams(name)
        assert qparams.scale == pytest.approx(float(found[name].scale), rel=1e-5)
        assert qparams.zero_point == int(found[name].zero_point)
    layer, inputs = exact.q, exact.norm(exact.embed(x))
    theirs, ours = found["q"](inputs), simulator.output("q", Call("linear", inputs, layer.weight, layer.bias))
    errors = [float((result - layer(inputs)).square().sum()) for result in (theirs, ours)]
    assert float((theirs - ours).square().sum()) < 0.5 * max(errors)  # next to boundaries


@pytest.mark.parametrize(
    ("recipes", "approach", "problem", "scheme"),
    [
        (
            {"smooth_quant": True, "smooth_quant_args": {"folding": True}},
            "static",
            "which layers can be folded",
            "w8a8",
        ),
        (
            {"smooth_quant": True, "smooth_quant_args": {"alpha": "auto"}},
            "static",
            "'auto' finds a strength for each layer",
            "w8a8_static_minmax",
        ),
        ({"smooth_quant": True}, "dynamic", "it smooths nothing", "w8a8_dynamic_act_tensor_asym"),
        (
            {"smooth_quant": True, "smooth_quant_args": {"alpha": {"q": 0.5}}},
            "static",
            "k, out and 2 more: quantized, not named in 'alpha'",
            "w8a8_static_minmax",
        ),
        ({"smooth_quant": False, "smooth_quant_args": {"alpha": "auto"}}, "static", None, "w8a8"),
    ],
)
def test_what_is_told(tmp_path: Path, recipes: dict[str, Any], approach: str, problem: str | None, scheme: str) -> None:
    """What is not simulated is named; nothing is smoothed then."""
    path = write(tmp_path / "smooth.json", {"approach": approach, "op_name_dict": {}, "recipes": recipes})
    found = complaints(path, list_ops(seeded()))
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]
    assert says(path, list_ops(seeded()))["fc1"] == scheme


def test_dynamic_runs_smooth_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As is told: the products are those of a run without the recipe."""
    monkeypatch.chdir(tmp_path)
    outputs = [fitted(seeded(), {"approach": "dynamic", "recipes": {"smooth_quant": on}})(IDS) for on in (True, False)]
    assert torch.equal(*outputs)


def test_what_a_run_writes_down_says_who_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something else reads the norm, every layer has its own scales, and the file of the run has them."""
    monkeypatch.chdir(tmp_path)
    recipes = {"smooth_quant": True, "smooth_quant_args": {"alpha": 0.7}}
    for residual in (False, True):
        ops = list_ops(seeded(residual=residual))
        model = fitted(seeded(residual=residual), {"approach": "static", "recipes": recipes})
        chosen = {**model.q_config, "op": {str(key): value for key, value in model.q_config["op"].items()}}
        path = write(tmp_path / f"chosen{residual}.json", json.dumps(chosen, default=lambda value: value.tolist()))
        said = says(path, ops)
        assert said["q"] == "w8a8_static_minmax_smoothquant0.7" + "_unshared" * residual
        assert said["embed"] == "unquantized"
        calibration, _ = simulated(path, seeded(residual=residual))
        for name in ("q", "k", "out"):
            scale, theirs = calibration.smoothing(name), model.model.get_submodule(name).input_scale
            assert scale is not None
            torch.testing.assert_close(scale, 1 / theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_qconfig_of_3x(tmp_path: Path, shared: bool) -> None:
    """``SmoothQuantConfig``: ``TorchSmoothQuant`` finds the same scales, shared where it says so."""
    sides = {"w_dtype": "int8", "w_granularity": "per_channel", "w_sym": True}
    sides |= {"act_dtype": "uint8", "act_granularity": "per_tensor", "act_sym": False, "act_algo": "minmax"}
    net = seeded()
    entries = {
        f"('{op.name}', 'Linear')": {"smooth_quant": {**sides, "alpha": 0.3, "folding": False, "scale_sharing": shared}}
        for op in list_ops(net)
        if op.type == "linear"
    }
    path = write(tmp_path / "qconfig.json", entries)
    assert complaints(path, list_ops(net)) == []
    assert set(says(path, list_ops(net)).values()) == {
        "unquantized",
        "w8a8_minmax_smoothquant0.3" + "_unshared" * (not shared),
    }
    calibration, _ = simulated(path, net)
    # its own class needs Intel's extension; that of 2.x is the same, and always shares
    theirs = TorchSmoothQuant(seeded(), example_inputs=IDS[:8], q_func=partial(_run, IDS))
    theirs.transform(alpha=0.3, folding=False)
    assert len(theirs.weight_scale_info) == 5
    scales = dict(theirs.weight_scale_info)
    if not shared:
        reach = net.norm(net.embed(IDS)).abs().amax(0)
        scales |= {name: cal_scale(reach, [net.get_submodule(name).weight], 0.3) for name in ("q", "k")}
    for name, scale in scales.items():
        ours = calibration.smoothing(name)
        assert ours is not None
        torch.testing.assert_close(ours, scale, rtol=1e-5, atol=0)


def _run(ids: Tensor, model: nn.Module) -> None:
    model(ids)


@pytest.mark.parametrize("name", ["alpha", "folding"])
def test_qconfig_of_3x_that_is_told(tmp_path: Path, name: str) -> None:
    """What depends on its tuning, or its graph."""
    given = {"w_dtype": "int8", "w_granularity": "per_channel", "act_dtype": "uint8", "act_granularity": "per_tensor"}
    given |= {"alpha": "auto"} if name == "alpha" else {"folding": True}  # type: ignore[dict-item]
    path = write(tmp_path / "qconfig.json", {"('q', 'Linear')": {"smooth_quant": given}})
    (found,) = complaints(path, list_ops(seeded())[1:2])
    assert f"'{name}': " in found
    assert "is not simulated" in found


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_scales_of_layers_that_share_an_input(alpha: float) -> None:
    """The largest weight of all counts; a channel that never fires has 1, and one without weights a limit."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(64, generator=generator) * 30
    weights = [torch.randn(16, 64, generator=generator), torch.randn(48, 64, generator=generator) * 3]
    inputs[5] = 0
    for weight in weights:
        weight[:, 9] = 0
    expected = cal_scale(inputs, weights, alpha)
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    found = smoothing_scale(inputs, largest, alpha)
    fires = inputs > 0
    assert int(fires.sum()) == 63
    torch.testing.assert_close(found[fires], expected[fires], rtol=1e-5, atol=0)
    assert float(found[5]) == 1
    assert alpha == 0 or float(expected[5]) == 1  # 0 to the power of 0 is 1, and no longer told from others
