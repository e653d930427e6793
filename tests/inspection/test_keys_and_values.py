"""Keys, values and queries: planted channels are named, and numbers are those of a computation by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from pytest_qsens.cli import main
from pytest_qsens.inspection.verdict import verdict
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from tests.inspection.harness import inspected, printed, write_result

if TYPE_CHECKING:
    from torch import Tensor

NET = '''
import torch
from torch import nn
from torch.nn import functional

from pytest_qsens import ModelSpec


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 6)

    def attend(self, q, k, v):
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def states(self, input_ids):
        return [part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.table(input_ids)).chunk(3, -1)]

    def forward(self, input_ids):
        return self.attend(*self.states(input_ids))


def spec():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Attending().eval()
        net.qkv.weight.data[16 + 11] *= 30  # keys: head 1, channel 3
        net.qkv.bias.data[16 + 11] *= 30
        batches = [{"input_ids": torch.randint(0, 50, shape)} for shape in ((3, 30), (3, 7), (3, 7))]
    return ModelSpec(net, batches[:1], batches[1:], output=lambda out, batch: out, logits=False)


def narrow():
    """Calibrated on one token."""
    found = spec()
    found.calibration[0]["input_ids"] = torch.tensor([[4]])
    return found
'''
PAGE = Path(__file__).parents[2] / "docs" / "inspect.md"
SCHEME = "attn_int8"
MODEL = "--model", "attends:spec"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measure the net; returns the path of its result."""
    directory = tmp_path_factory.mktemp("attends")
    (directory / "attends.py").write_text(NET)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        write_result(
            resolve(ModelRequest(MODEL[1])), directory / "r.json", scheme=SCHEME, modes=("isolated", "fallback")
        )
        yield directory / "r.json"  # type: ignore[misc] # a fixture


def int8(values: Tensor, largest: Tensor) -> Tensor:
    """Round with one scale; half of 255 steps are the largest magnitude."""
    scale = largest / 127.5
    return (values / scale).round().clamp(-128, 127) * scale


def test_an_outlier_channel_of_keys(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told with its head, what it does to all others is counted, and scales that leave it apart are better."""
    found = printed(path, ":k", *MODEL)
    spec = resolve(ModelRequest(MODEL[1])).load()
    with torch.no_grad():
        seen = torch.cat([spec.model.states(**batch)[1] for batch in spec.calibration])
        exact = [spec.model.states(**batch) for batch in spec.evaluation]
        keys = torch.cat([states[1] for states in exact])
        rounded = int8(keys, seen.abs().max())
        outputs = torch.cat([spec.model.attend(*states) for states in exact]).double()
        wrong = [spec.model.attend(q, int8(k, seen.abs().max()), v) for q, k, v in exact]
    error = (torch.cat(wrong).double() - outputs).square().sum() / outputs.square().sum()
    assert found["whole"]["nmse"] == pytest.approx(float(error), rel=1e-4)
    assert found["whole"]["local_nmse"] == pytest.approx(
        float((rounded - keys).double().square().sum() / keys.double().square().sum()), rel=1e-5
    )
    channels = keys.abs().amax((0, 2)).flatten()
    summary = found["inputs"]["evaluation_channels"]
    assert (summary["count"], summary["outliers"]) == (16, 1)
    assert summary["most"] == pytest.approx(float(channels.max()))
    assert summary["worst"][0]["index"] == 8 + 3
    assert found["inputs"]["peak_channel"] == 8 + 3
    sample, position = divmod(int(keys[:, 1, :, 3].abs().argmax()), 7)
    peak = found["inputs"]["peak"]
    assert (peak["batch"], peak["row"], peak["position"]) == (1 + sample // 3, sample % 3, position)
    by_head = (rounded - keys).square().sum((0, 2, 3))
    assert [head["error"] for head in found["heads"]] == pytest.approx((by_head / by_head.sum()).tolist(), rel=1e-4)
    assert [head["largest"] for head in found["heads"]] == pytest.approx(keys.abs().amax((0, 2, 3)).tolist())
    (lost,) = found["lost"]
    assert (lost["part"], lost["values"]) == ("keys", keys.numel())
    assert lost["rounded_away"] == pytest.approx(float(((rounded == 0) & (keys != 0)).float().mean()))
    beyond = (keys > seen.abs().max()) | (keys < -seen.abs().max() * 128.5 / 127.5)
    assert lost["clipped"] == pytest.approx(float(beyond.float().mean()), abs=1e-9)
    assert found["parts"] == []
    assert found["explained"] is found["interaction"] is found["weight_outputs"] is found["outputs"] is None
    assert found["at_op"]["tokens"]
    assert found["at_op"]["sse"] == pytest.approx(float((rounded - keys).double().square().sum()), rel=1e-5)
    told = " ".join(capsys.readouterr().out.split())
    assert told.startswith(":k: Nothing but keys of attention is rounded: channel 1:3 reaches ")
    assert "keys of attention; 3x2x7x8 (batch x heads x tokens x channels); op 2 of 3" in told
    assert "1 of 16: 1:3 (" in told
    better = {other["scheme"]: other["factor"] for other in found["alternatives"] if other["factor"]}
    assert better["attn_int8_channel"] > 5
    assert better["attn_int8_dynamic"] > 1
    bits = {other["scheme"]: other["bits"] for other in found["alternatives"]}
    assert (bits["attn_int8_channel"], bits["attn_int8_dynamic"]) == (8, 8 + 16 / 8)


def test_the_page_shows_what_is_measured(path: Path) -> None:
    """The numbers of the page, but for what machines differ by, and its first sentences."""
    found = inspected(path, ":k", *MODEL)
    page = PAGE.read_text()
    told, text = (re.sub(r"[\d.]+", "#", words) for words in (verdict(found), " ".join(page.split())))
    assert told in text
    shown = dict(re.findall(r"^ +(attn_\w+) +\S+ +(\S+) x ", page, re.MULTILINE))
    factors = {other.scheme: other.factor for other in found.alternatives if other.scheme in shown}
    assert len(factors) == 5
    assert {name: float(shown[name]) for name in factors} == pytest.approx(factors, rel=0.05)
    heads = re.findall(r"^ +\d +(\S+) +(\S+) %$", page, re.MULTILINE)
    assert [float(largest) for largest, _ in heads] == pytest.approx([head.largest for head in found.heads], rel=0.05)
    assert [float(error) for _, error in heads] == pytest.approx([100 * head.error for head in found.heads], rel=0.05)


@pytest.mark.parametrize(
    ("op", "scheme"), [(":k", "attn_int8_channel_asym"), (":v", "attn_fp8"), (":q", "attn_int8_head")]
)
def test_an_alternative_is_what_a_run_with_it_measures(op: str, scheme: str, path: Path) -> None:
    """Whatever the present scheme is; and under it, its own losses are counted."""
    (other,) = inspected(path, op, *MODEL, "--against", scheme).alternatives
    again = write_result(resolve(ModelRequest(MODEL[1])), path.with_name("again.json"), scheme=scheme, only=op)
    scores = next(found for found in again.ops if found.op == op).isolated
    assert other.flip is not None
    assert scores is not None
    assert other.flip.nmse == pytest.approx(scores["nmse"], rel=1e-4)
    now = inspected(path, op, *MODEL, "--scheme", scheme, "--against", SCHEME)
    assert now.whole.nmse == pytest.approx(other.flip.nmse)
    assert now.lost[0].part == {"k": "keys", "v": "values", "q": "queries"}[op[-1]]
    assert now.lost[0].clipped is not None


def test_the_other_mode(path: Path) -> None:
    """Beside quantized keys and values, an op is what the run measured it to be."""
    found = inspected(path, ":v", *MODEL, "--mode", "fallback", "--against", "attn_fp8")
    assert found.recorded.scores is not None
    assert found.base == pytest.approx(found.recorded.scores["nmse"], rel=1e-4)
    assert not found.differs


def test_scales_that_clip_nothing(path: Path) -> None:
    """Those of the values at hand reach as far as these."""
    found = {
        scheme: inspected(path, ":k", *MODEL, "--scheme", scheme, "--against", SCHEME).lost[0].clipped
        for scheme in ("kv_int8_dynamic", "kv_fp8_dynamic_tensor")
    }
    assert found == {"kv_int8_dynamic": 0, "kv_fp8_dynamic_tensor": 0}


@pytest.mark.parametrize(
    "scheme", ["kv_int8", "kv_int8_channel", "kv_int8_channel_asym", "kv_int8_head", "kv_fp8_head"]
)
def test_what_is_clipped(scheme: str, path: Path) -> None:
    """Values farther from the largest number of the format than half a step, as the grid of numbers says."""
    name = "attends:narrow"
    result = path.with_name("narrow.json")
    write_result(resolve(ModelRequest(name)), result, scheme=scheme, only=":k")
    (lost,) = inspected(result, ":k", "--model", name, "--against", SCHEME).lost
    spec = resolve(ModelRequest(name)).load()
    with torch.no_grad():
        seen = spec.model.states(**spec.calibration[0])[1]
        keys = torch.cat([spec.model.states(**batch)[1] for batch in spec.evaluation]).double()
    dims = {"channel": (0, 2), "head": (0, 2, 3)}.get(
        scheme.split("_")[2] if scheme.count("_") > 1 else "", (0, 1, 2, 3)
    )
    low, high = (end.double() for end in (seen.amin(dims, keepdim=True), seen.amax(dims, keepdim=True)))
    low, high = low.clamp(max=0), high.clamp(min=0)
    reach = torch.maximum(-low, high)
    if "fp8" in scheme:
        least, most = -reach * 464 / 448, reach * 464 / 448
    elif "asym" in scheme:
        scale = (high - low) / 255
        zero = (-128 - (low / scale).round()).clamp(-128, 127)
        least, most = (-128.5 - zero) * scale, (127.5 - zero) * scale
    else:
        least, most = -reach * 128.5 / 127.5, reach
    expected = float(((keys < least) | (keys > most)).double().mean())
    assert lost.clipped == pytest.approx(expected, abs=1e-9)
    assert expected > 0


def test_what_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scheme of layers, and one that does not fit, by name; other schemes are listed with the reason."""
    for scheme, told in (
        ("w8a8", "w8a8 leaves queries, keys and values of attention as they are"),
        ("kv_int4_dynamic_g32_asym", "8 of them cannot be divided by 32"),
    ):
        assert main(["inspect", str(path), ":k", *MODEL, "--scheme", scheme]) == 4
        assert told in capsys.readouterr().err
    (other,) = inspected(path, ":k", *MODEL, "--against", "w8a8").alternatives
    assert (other.flip, other.reason) == (None, "w8a8 leaves queries, keys and values of attention as they are")
    assert "w8a8" not in verdict(inspected(path, ":k", *MODEL, "--against", "w8a8"))
