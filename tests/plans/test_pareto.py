"""The plot of plans: real files of the kind that was asked for, with what was planned in them."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from PIL import Image

from pytest_qsens.cli import main
from tests.plans.test_command import result

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def texts(path: Path) -> list[str]:
    """Return all texts in a picture."""
    return ["".join(element.itertext()).strip() for element in ET.parse(path).iterfind(".//{*}text")]


def test_a_picture_with_the_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Axes, title and the plan are named; drawn again it is the same file, byte for byte."""
    file, out, drawn = result(tmp_path / "a.json"), tmp_path / "plan.yaml", tmp_path / "plan.svg"
    arguments = ["plan", file, "--budget-bits", "12.8", "--out", str(out), "--plot", str(drawn)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith(f"wrote {out}\nwrote {drawn}\n")
    found = texts(drawn)
    for text in ("m: w8a8", "predicted nmse of the output", "bits a weight (unquantized: 16)", "plans"):
        assert text in found
    assert "at most 12.8 bits a weight" in found
    before = drawn.read_bytes()
    assert main(arguments) == 0
    assert drawn.read_bytes() == before


def test_a_spectrum_in_pixels(tmp_path: Path) -> None:
    """Other kinds of files are what their names say; what has no error has no place on the axis, and is no trouble."""
    file = result(tmp_path / "a.json")
    for share in ("0", "0,50,100"):
        arguments = ["plan", file, "--spectrum", share, "--out", str(tmp_path / "s.yaml")]
        assert main([*arguments, "--plot", str(tmp_path / "s.png")]) == 0
        with Image.open(tmp_path / "s.png") as image:
            assert image.format == "PNG"
            assert len(image.convert("RGB").getcolors(10**6)) > 10
    assert main([*arguments, "--plot", str(tmp_path / "s.pdf")]) == 0
    assert (tmp_path / "s.pdf").read_bytes().startswith(b"%PDF-")


def test_plots_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a plan is written: another kind of file, no directory, no matplotlib."""
    arguments = ["plan", result(tmp_path / "a.json"), "--keep", "20%", "--out", str(tmp_path / "plan.yaml"), "--plot"]
    assert main([*arguments, str(tmp_path / "p.gif")]) == 4
    assert "a plot is written as .svg, .png, .pdf" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "no" / "p.svg")]) == 4
    assert "there is no directory" in capsys.readouterr().err
    monkeypatch.setattr("pytest_qsens.report.pareto.find_spec", lambda _: None)
    assert main([*arguments, str(tmp_path / "p.svg")]) == 4
    assert "pip install 'pytest-qsens[report]'" in capsys.readouterr().err
    assert not (tmp_path / "plan.yaml").exists()
