"""`qsens inspect` on MiniLM's real weights and on a Qwen2.5-VL with images and text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from pytest_qsens.calibrated import calibrate
from pytest_qsens.cli import main
from pytest_qsens.inspection.verdict import verdict
from pytest_qsens.manifest import load_manifest
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.models.tiny import IMAGE
from pytest_qsens.report.inspection import report
from tests.inspection.harness import inspected, write_result

if TYPE_CHECKING:
    from pytest_qsens.inspection.found import Inspection

OP = "encoder.layer.0.output.dense"
TINY_OP = "model.visual.patch_embed.proj"
PAGE = Path(__file__).parents[2] / "docs" / "inspect.md"


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    """Inspect the most sensitive op of MiniLM."""
    path = tmp_path_factory.mktemp("minilm") / "qsens.json"
    write_result(resolve(ModelRequest("minilm")), path, only=OP)
    return inspected(path, OP, "--against", "w8a8_dynamic", "--against", "w8a8_static", "--against", "w8a16")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measure the tiny Qwen2.5-VL."""
    path = tmp_path_factory.mktemp("tiny") / "qsens.json"
    write_result(resolve(ModelRequest("tiny_qwen2_5_vl")), path, only=TINY_OP)
    return path


def test_what_makes_minilms_most_sensitive_op_so(minilm: Inspection) -> None:
    """One channel of the output is so large that requantization puts nearly all others to zero."""
    assert minilm.whole.nmse == pytest.approx((minilm.recorded.scores or {})["nmse"], rel=1e-4)
    assert not minilm.differs
    assert (minilm.shape.number, minilm.shape.ops) == (9, 40)  # of those that a scheme with weights can quantize
    shares = {part.name: minilm.share(part) or 0.0 for part in minilm.parts}
    assert shares["output"] > 0.9
    assert minilm.outputs is not None
    assert minilm.outputs.worst[0].index == 99
    assert minilm.outputs.worst[0].times > 100
    assert {lost.part: lost.rounded_away for lost in minilm.lost}["output"] > 0.8
    text = verdict(minilm)
    assert "of the error comes from the output, which is requantized: its channel 99 reaches" in text
    assert re.search(r"w8a8_dynamic, in the same number formats, lowers the error 1\d\d times", text)
    assert minilm.inputs is not None
    assert (minilm.inputs.peak_channel, minilm.inputs.peak.text) == (856, "[CLS]")


def test_minilms_errors_are_at_real_tokens(minilm: Inspection) -> None:
    """Padding is in no count, and positions have the words of the data."""
    spec = resolve(ModelRequest("minilm")).load()
    real = sum(int(batch["attention_mask"].sum()) for batch in spec.evaluation)
    for where in (minilm.at_output, minilm.at_op):
        assert where is not None
        assert where.positions == real
        assert all(group.name != "padding" for group in where.groups)
        assert all(worst.place.text for worst in where.worst)
    assert minilm.at_output is not None
    assert minilm.scores is not None
    assert minilm.at_output.sse == pytest.approx(minilm.scores["sse"], rel=1e-12)


def test_the_page_shows_what_is_measured(minilm: Inspection) -> None:
    """The numbers of the page, but for what machines differ by."""
    page = PAGE.read_text()
    rows = dict(re.findall(r"^ +(the \w+ alone|sum of these|the op) +(\S+)", page, re.MULTILINE))
    expected = {f"the {part.name} alone": part.nmse for part in minilm.parts}
    expected |= {"sum of these": minilm.explained, "the op": minilm.whole.nmse}
    assert {name: float(rows[name]) for name in expected} == pytest.approx(expected, rel=0.05)
    for other in minilm.alternatives:
        shown = re.search(rf"^ +{other.scheme} +(\S+) ", page, re.MULTILINE)
        assert other.flip is not None
        assert shown is None or float(shown[1]) == pytest.approx(other.flip.nmse, rel=0.05)


def test_images_and_text_are_told_apart(tiny: Path) -> None:
    """The error at image tokens and at text tokens is that of another engine's outputs at these positions."""
    found = inspected(tiny, TINY_OP, "--against", "w8a16")
    source = resolve(ModelRequest("tiny_qwen2_5_vl"))
    spec = source.load()
    calibrated = calibrate(spec, load_manifest(source, None), "w8a8", engine="replay")
    engine = calibrated._engine
    expected = {"image": 0.0, "text": 0.0}
    counts = dict.fromkeys(expected, 0)
    with torch.no_grad():
        for batch, reference, output in zip(spec.evaluation, engine.references, engine.isolated(TINY_OP), strict=True):
            images = batch["input_ids"][0] == IMAGE
            errors = (output.double() - reference.double()).square().sum(1)
            for kind, chosen in (("image", images), ("text", ~images)):
                expected[kind] += float(errors[chosen].sum())
                counts[kind] += int(chosen.sum())
    assert found.at_output is not None
    groups = {group.name: group for group in found.at_output.groups}
    assert {name: groups[name].sse for name in expected} == pytest.approx(expected, rel=1e-6)
    assert {name: groups[name].positions for name in counts} == counts
    assert groups["first"].sse == 0  # no image is before the first token
    assert found.at_op is not None
    assert not found.at_op.tokens  # of patches, which are no tokens
    assert "image tokens" in verdict(found)


def test_the_text_model_sees_tokens(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An op of the language model has both kinds of tokens in its own output; ids stand for what has no tokenizer."""
    op = "model.language_model.layers.1.mlp.down_proj"
    found = inspected(tiny, op, "--against", "w8a16")
    assert found.at_op is not None
    assert {group.name for group in found.at_op.groups} == {"text", "image", "first"}
    assert found.recorded.scores is None
    assert main(["inspect", str(tiny), op, "--against", "w8a16"]) == 0
    printed = capsys.readouterr().out
    assert "has no score of it in mode isolated: unrun (not selected)" in printed
    assert "worst (batch:sample:position): " in printed
    assert " id " in printed


@pytest.mark.parametrize("width", [30, 60, 80, 100, 200])
def test_narrow_and_plain_terminals(minilm: Inspection, width: int) -> None:
    """No line is wider than the terminal, nothing is lost that it has no letters for, nothing moves the cursor."""
    assert minilm.at_output is not None
    worst = minilm.at_output.worst[0]
    odd = replace(worst, place=replace(worst.place, text="\x1b[2J日本é\n"))
    found = replace(minilm, at_output=replace(minilm.at_output, worst=(odd,)))
    lines = list(report(found, width, "ascii", everything=True))
    assert max(map(len, lines)) <= max(40, width)
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert "\\u65e5" in "".join(lines)
    assert any("日本é" in line for line in report(found, 400, "utf-8"))
