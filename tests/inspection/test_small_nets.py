"""What is planted in small nets is found, and every number is what a computation by hand gives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.quantization.observer import HistogramObserver, PerChannelMinMaxObserver

from pytest_qsens.graph.calls import Call
from pytest_qsens.inspection.ranges import lost_in_weight
from pytest_qsens.inspection.verdict import verdict
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.op_scheme import OpScheme, SmoothQuant, WeightScheme
from pytest_qsens.quant.schemes import PER_TOKEN, SCHEMES, Scheme
from pytest_qsens.quant.simulate import Simulator
from pytest_qsens.result_files import load
from tests.inspection.harness import NETS, inspected, printed, write_result

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pytest_qsens.inspection.found import Inspection
    from pytest_qsens.models.spec import ModelSpec

NONE = ("--against", "w8a16")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Measure one of the nets; returns the path of its result."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)

    def make(net: str, **kwargs: Any) -> Path:  # noqa: ANN401 - as `write_result` has it
        path = tmp_path / f"{net}.json"
        write_result(resolve(ModelRequest(f"{name}:{net}")), path, **kwargs)
        return path

    make.module = name  # type: ignore[attr-defined] # for the command line
    return make


def model_of(made: Callable[..., Path], net: str) -> tuple[str, str]:
    """Arguments that name the model."""
    return "--model", f"{made.module}:{net}"  # type: ignore[attr-defined] # the fixture's


def spec_of(made: Callable[..., Path], net: str) -> ModelSpec:
    """Load the same model again."""
    return resolve(ModelRequest(model_of(made, net)[1])).load()


def part(found: Inspection, name: str) -> float:
    """Share of a part in the error."""
    share = found.share(next(p for p in found.parts if p.name == name))
    assert share is not None
    return share


def test_an_input_outlier_is_named(made: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A large channel of the input is what the verdict names; scales per token do not help, a finer format does."""
    path = made("input_outlier")
    found = printed(path, "0", *model_of(made, "input_outlier"))
    assert found["shares"]["input"] > 0.9
    assert found["inputs"]["evaluation_channels"]["worst"][0]["index"] == 5
    assert found["inputs"]["peak_channel"] == 5
    text = capsys.readouterr().out
    assert text.startswith("0: 9")
    assert "% of the error comes from the input: its channel 5 reaches" in " ".join(text.split())
    best = found["alternatives"][0]
    assert f"{best['factor']:.3g} x" in text
    assert best["flip"]["nmse"] * best["factor"] == pytest.approx(found["whole"]["nmse"])


def test_a_weight_outlier_is_named(made: Callable[..., Path]) -> None:
    """A large input channel of the weight widens the steps of all rows, and the weight is to blame."""
    found = inspected(made("weight_outlier"), "0", *model_of(made, "weight_outlier"), *NONE)
    assert part(found, "weight") > 0.9
    assert found.weight_inputs.worst[0].index == 3
    assert " % of the error comes from the weight: its input channel 3 reaches" in verdict(found)
    assert " become zero" in verdict(found)


def test_nothing_is_blamed_where_nothing_stands_out(made: Callable[..., Path]) -> None:
    """Gaussian weights and inputs: no outliers, no clipping, and no part alone is named."""
    found = inspected(made("plain"), "0", *model_of(made, "plain"), *NONE)
    assert "reaches" not in verdict(found)
    assert all(not channels.worst for channels in (found.weight_outputs, found.weight_inputs))
    assert all(part(found, name) < 0.75 for name in ("weight", "input", "output"))


def by_hand(spec: ModelSpec) -> dict[str, float]:
    """NMSE of each part of w8a8 of the first layer, with torch's own observers."""
    model = spec.model
    assert isinstance(model, torch.nn.Sequential)
    first: Any = model[0]
    observers = [HistogramObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine) for _ in range(2)]
    per_channel = PerChannelMinMaxObserver(ch_axis=0, dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    with torch.no_grad():
        for batch in spec.calibration:
            observers[0](batch["input"])
            observers[1](first(batch["input"]))
        per_channel(first.weight)
        scale, zero = per_channel.calculate_qparams()
        weight = torch.fake_quantize_per_channel_affine(first.weight, scale, zero.int(), 0, -128, 127)

        def rounded(values: Tensor, observer: HistogramObserver) -> Tensor:
            scale, zero = observer.calculate_qparams()  # type: ignore[no-untyped-call] # torch's
            # a multiplication and addition with one rounding, as in the int8 kernels: ties decide with a few values
            codes = (values.double() * (1 / scale).double() + zero).float().round().clamp(0, 255)
            return (codes - zero) * scale

        def outputs(part: str) -> Tensor:
            parts = []
            for batch in spec.evaluation:
                x = rounded(batch["input"], observers[0]) if part in ("input", "all") else batch["input"]
                y = torch.nn.functional.linear(x, weight if part in ("weight", "all") else first.weight, first.bias)
                parts.append(model[1:](rounded(y, observers[1]) if part in ("output", "all") else y))
            return torch.cat(parts).double()

        exact = outputs("none")
        names = ("weight", "input", "output", "all")
        return {name: float((outputs(name) - exact).square().sum() / exact.square().sum()) for name in names}


@pytest.mark.parametrize("net", ["plain", "input_outlier", "weight_outlier", "wider"])
def test_the_parts_are_those_of_a_computation_by_hand(made: Callable[..., Path], net: str) -> None:
    """Weight, input and output alone, and all of it: as with torch's observers and plain arithmetic."""
    found = inspected(made(net), "0", *model_of(made, net), *NONE)
    expected = by_hand(spec_of(made, net))
    measured = {flip.name: flip.nmse for flip in found.parts} | {"all": found.whole.nmse}
    assert measured == pytest.approx(expected, rel=2e-3)
    assert found.explained == pytest.approx(sum(value for name, value in expected.items() if name != "all"), rel=2e-3)
    left = (expected["all"] - sum(v for n, v in expected.items() if n != "all")) / expected["all"]
    assert found.interaction == pytest.approx(left, abs=5e-3)
    weight_only = next(a for a in found.alternatives if a.scheme == "w8a16")
    assert weight_only.flip is not None
    assert weight_only.flip.nmse == pytest.approx(measured["weight"], rel=1e-4)


def test_losses_are_those_of_numpy(made: Callable[..., Path]) -> None:
    """Clipped and rounded-away shares of input, output and weight, counted with NumPy."""
    found = inspected(made("wider"), "0", *model_of(made, "wider"), *NONE)
    spec = spec_of(made, "wider")
    first: Any = spec.model[0]  # type: ignore[index] # a Sequential
    lost = {one.part: one for one in found.lost}
    with torch.no_grad():
        for name, run in (("input", lambda x: x), ("output", first)):
            observer = HistogramObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
            for batch in spec.calibration:
                observer(run(batch["input"]))
            scale, zero = (float(value) for value in observer.calculate_qparams())  # type: ignore[no-untyped-call] # torch's
            values = np.concatenate([run(batch["input"]).numpy().ravel() for batch in spec.evaluation])
            codes = np.round(values / scale) + zero
            clipped, away = np.mean((codes < 0) | (codes > 255)), np.mean(codes[values != 0] == zero)
            assert lost[name].values == values.size
            assert lost[name].clipped == pytest.approx(clipped)
            assert lost[name].rounded_away == pytest.approx(away)
            assert clipped > 0.05
    weight = first.weight.detach().numpy()
    codes = np.round(weight / (np.abs(weight).max(1, keepdims=True) / 127.5))
    assert lost["weight"].rounded_away == pytest.approx(np.mean(codes == 0))
    assert lost["weight"].clipped == 0
    assert found.inputs is not None
    seen = np.concatenate([batch["input"].numpy().ravel() for batch in spec.calibration])
    values = np.concatenate([batch["input"].numpy().ravel() for batch in spec.evaluation])
    assert found.inputs.outside == pytest.approx(np.mean((values < seen.min()) | (values > seen.max())))
    assert found.inputs.calibration == (seen.min(), seen.max())
    assert found.inputs.evaluation == (values.min(), values.max())
    assert abs(found.inputs.peak_value) == np.abs(values).max()


def test_channels_are_those_of_numpy(made: Callable[..., Path]) -> None:
    """Ranges of output and input channels, and of what goes in."""
    found = inspected(made("input_outlier"), "0", *model_of(made, "input_outlier"), *NONE)
    spec = spec_of(made, "input_outlier")
    weight = np.abs(spec.model[0].weight.detach().numpy())  # type: ignore[index] # a Sequential
    x = np.abs(np.concatenate([batch["input"].numpy() for batch in spec.evaluation]))
    assert found.inputs is not None
    for channels, largest in (
        (found.weight_outputs, weight.max(1)),
        (found.weight_inputs, weight.max(0)),
        (found.inputs.evaluation_channels, x.max(0)),
    ):
        ordered = np.sort(largest)
        assert (channels.least, channels.most) == (ordered[0], ordered[-1])
        assert channels.median == pytest.approx(ordered[(len(ordered) - 1) // 2])
        assert channels.outliers == np.sum(largest > 5 * channels.median)
        assert channels.count == len(largest)


def test_a_block_format_clips(made: Callable[..., Path]) -> None:
    """MXFP4 takes the power of two below the largest value: what is above 6 times that is clipped, as the bits say."""
    path = made("wider", scheme="mxfp4_dynamic", only="2")
    found = inspected(path, "2", *model_of(made, "wider"), *NONE)
    lost = {one.part: one for one in found.lost}
    weight = spec_of(made, "wider").model[2].weight.detach().numpy()  # type: ignore[index] # a Sequential
    scale = 2.0 ** (np.floor(np.log2(np.abs(weight).max(1, keepdims=True))) - 2)  # 32 columns are one block
    assert lost["weight"].clipped == pytest.approx(np.mean(np.abs(weight) / scale > 7))
    assert lost["weight"].clipped
    assert lost["input"].clipped
    assert lost["weight"].rounded_away == pytest.approx(np.mean(np.abs(weight) / scale <= 0.25))


def test_every_named_scheme_is_an_alternative(made: Callable[..., Path]) -> None:
    """All schemes with a short name are tried; each has a score, or says why it has none; the best come first."""
    found = inspected(made("plain"), "2", *model_of(made, "plain"))
    assert {a.scheme for a in found.alternatives} == SCHEMES.keys() - {"w8a8"}
    able = [a for a in found.alternatives if a.flip is not None]
    assert [a.flip.nmse for a in able if a.flip] == sorted(a.flip.nmse or 0 for a in able if a.flip)
    reasons = {a.scheme: a.reason for a in found.alternatives if a.flip is None}
    assert "cannot be divided by 64" in (reasons["w4a16_g64"] or "")
    assert all(found.alternatives.index(a) >= len(able) for a in found.alternatives if a.flip is None)
    bits = {a.scheme: a.bits for a in found.alternatives}
    assert (bits["w8a16"], bits["w4a16_g32"]) == (8, 4.5)


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "fp8_static", "nvfp4_local", "mxfp8_dynamic"])
def test_an_alternative_is_what_a_run_with_it_measures(made: Callable[..., Path], scheme: str) -> None:
    """What is promised of another scheme is what the gate would say under it."""
    found = inspected(made("plain"), "2", *model_of(made, "plain"), "--against", scheme)
    (other,) = found.alternatives
    path = Path(found.recorded.path).with_name("again.json")
    source = resolve(ModelRequest(model_of(made, "plain")[1]))
    measured = write_result(source, path, scheme=scheme, only="2").ops[1].isolated
    assert measured is not None
    assert other.flip is not None
    assert other.flip.nmse == pytest.approx(measured["nmse"], rel=1e-6)
    asked = inspected(made("plain"), "2", *model_of(made, "plain"), "--scheme", scheme, *NONE)
    assert asked.whole.nmse == other.flip.nmse
    assert not asked.differs


def test_fallback_only(made: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a result in mode fallback, parts are what they add to a model with everything else quantized."""
    path = made("weight_outlier", modes=("fallback",))
    found = printed(path, "0", *model_of(made, "weight_outlier"), *NONE)
    assert found["mode"] == "fallback"
    assert found["base"] == pytest.approx(found["recorded"]["scores"]["nmse"], rel=1e-6)
    assert found["whole"]["added"] == pytest.approx(found["recorded"]["scores"]["gain"], rel=1e-4)
    assert found["whole"]["nmse"] == pytest.approx(found["base"] + found["whole"]["added"])
    assert found["shares"]["weight"] > 0.9
    assert found["at_output"] is None
    assert "when all ops are quantized" in capsys.readouterr().out


def test_both_modes(made: Callable[..., Path]) -> None:
    """Mode isolated is asked about unless the other one is."""
    path = made("plain", modes=("isolated", "fallback"))
    assert inspected(path, "0", *model_of(made, "plain"), *NONE).mode == "isolated"
    found = inspected(path, "0", *model_of(made, "plain"), *NONE, "--mode", "fallback")
    scores = [op.fallback["nmse"] or 0.0 for op in load(path).ops if op.fallback is not None]
    assert (found.mode, found.recorded.ranked) == ("fallback", 2)
    assert found.recorded.rank == 1 + sum(score < found.base for score in scores if score != pytest.approx(found.base))
    assert not found.differs


def test_what_breaks_the_model(made: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """An op that fails gets the reason, which parts do it, and what does not; nothing is a number that is none."""
    found = printed(
        made("breaking"), "first", *model_of(made, "breaking"), "--against", "w8a16", "--against", "w8a8_static"
    )
    assert found["recorded"]["status"] == "failed"
    assert found["whole"]["nmse"] is None
    assert {part["name"]: part["failure"] is None for part in found["parts"]} == {
        "weight": True,
        "input": True,
        "output": False,
    }
    assert found["shares"] == {"weight": None, "input": None, "output": None}
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("first: the output holds NaN or infinite values when the op is quantized as w8a8 says.")
    assert (
        "The output alone does so, too. w8a8_static, in the same number formats, lowers the error to a finite one"
        in text
    )
    assert "nan" not in text


def test_rows_that_are_not_finite_are_left_out(made: Callable[..., Path]) -> None:
    """A quarter of the rows is NaN: they are in no range, no share and no error."""
    found = inspected(made("holes"), "first", *model_of(made, "holes"), "--against", "w8a8_dynamic")
    assert found.whole.nmse == pytest.approx((found.recorded.scores or {})["nmse"], rel=1e-6)
    assert [lost.values for lost in found.lost[1:]] == [2 * 18 * 16] * 2
    assert all(flip.local_nmse is not None and 0 < flip.local_nmse < 0.01 for flip in (found.whole, *found.parts))
    assert found.inputs is not None
    assert 0 < abs(found.inputs.peak_value) < 10
    assert found.interaction == pytest.approx(0, abs=0.2)


def test_convolutions_embeddings_and_ops_called_twice(made: Callable[..., Path]) -> None:
    """Every type of op is inspected; an op called twice has the inputs of both calls."""
    path = made("mixed")
    model = model_of(made, "mixed")
    conv = inspected(path, "conv", *model, "--against", "w8a8_dynamic", "--against", "w8a16")
    assert conv.shape.weight == (8, 3, 3, 3)
    assert conv.weight_inputs.count == 3
    assert conv.inputs is not None
    assert conv.inputs.evaluation_channels.count == 3
    assert "has no tokens" in (conv.alternatives[-1].reason or "")
    twice = inspected(path, "twice", *model, *NONE)
    assert twice.lost[1].values == 2 * 2 * 6 * 8
    assert twice.whole.nmse == pytest.approx((twice.recorded.scores or {})["nmse"], rel=1e-6)
    table = inspected(path, "table", *model)
    assert [flip.name for flip in table.parts] == ["weight"]
    assert table.inputs is None
    assert table.whole.nmse == table.parts[0].nmse
    assert {a.reason for a in table.alternatives if a.scheme in ("w8a16", "w8a8_static")} == {
        "int8 with a scale per row, as now"
    }


def test_clipping_is_of_the_smoothed_weight() -> None:
    """What is rounded is the weight times its scales: MXFP4 clips other values of that."""
    model = nn.Linear(32, 16, bias=False).requires_grad_(requires_grad=False)
    model.weight.data = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 32)
    scheme = Scheme(OpScheme(WeightScheme("mxfp4", "group", (32,)), PER_TOKEN, smoothing=SmoothQuant()))
    calibration = Calibration({"op": scheme})
    call = Call("linear", x, model.weight)
    for _ in calibration.passes():
        calibration.observe("op", call, model(x))
    lost = lost_in_weight("op", call, scheme, Simulator({"op": scheme}, calibration), calibration)
    smoothed_by = x.abs().amax(0) ** 0.5 / model.weight.abs().amax(0) ** 0.5
    smoothed, plain = (values.abs().numpy() for values in (model.weight * smoothed_by, model.weight))
    shares = []
    for values in (smoothed, plain):
        scale = 2.0 ** (np.floor(np.log2(values.max(1, keepdims=True))) - 2)
        shares.append(np.mean(values / scale > 7))
    assert shares[0] != shares[1]
    assert lost.clipped == pytest.approx(shares[0])
