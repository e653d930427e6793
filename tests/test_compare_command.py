"""The command ``qsens compare``."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qsens.cli import main
from pytest_qsens.results import OpResult
from tests.sensitivities import LANGUAGE, VISION, measured, model_opt, neural_compressor, results, text_only

if TYPE_CHECKING:
    from pathlib import Path

OURS = [
    *(measured(f"model.{name}", 0.1 * (index + 1), 0.9 - 0.1 * index) for index, name in enumerate(LANGUAGE)),
    *(measured(f"model.{name}", 0.01 * (index + 1), 0.95) for index, name in enumerate(VISION[1:])),
    OpResult(f"model.{VISION[0]}", "linear", "", "unexercised", "no batch reaches it"),
    OpResult("lm_head", "linear", "", "failed", "NaN when quantized"),
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """ModelOpt's list of a model that saw text alone, and our result of it."""
    monkeypatch.chdir(tmp_path)
    text_only(tmp_path / "modelopt.json")
    results(tmp_path / "ours.json", OURS)
    return ["compare", "modelopt.json", "ours.json"]


def output(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run the command, which must succeed."""
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_the_report(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A reader sees what each file is and which direction it has, what was assumed, and which values are no values.

    The second row by hand: 5 tied values last in A; Spearman 65 / sqrt(100 * 110), tau-b (30 - 15) / sqrt(45 * 55).
    """
    text = output(capsys, [*files, "--top", "2"])
    expected = """\
A: modelopt.json
   ModelOpt AutoQuantize: model Tiny-VL, scheme int8
   sensitivity, isolated (only this op quantized)
   LARGER means a more sensitive op
   12 ops, 12 with a value
   6 ops share the value 0: probably never measured, so not ranked
   note: it can score layers as a group, named by one of them (q_proj for q, k
     and v; gate_proj for gate and up)
B: ours.json
   pytest-qsens: model tiny, scheme w8a8, engine replay
   nmse, isolated (only this op quantized)
   LARGER means a more sensitive op
   13 ops, 11 with a value

12 common ops ('model.' assumed in front of A's names, which 12 need), 6 of
  them ranked in both files

rank correlation; on both sides rank 1 is the most sensitive op
(1: same order, 0: unrelated, -1: reversed)
                                        ops   Spearman  Kendall tau-b
  ops ranked in both                      6     -1.000         -1.000
  with those probably never measured     11      0.620          0.302

0 of the 2 most sensitive ops are the same (0.7 expected by chance)
 only in A's:
  #A   #B    value A   value B  op
   1    6        0.5       0.1  model.language_model.layers.0.self_attn.q_proj
   2    5       0.25       0.2  model.language_model.layers.0.mlp.gate_proj
 only in B's:
  #A   #B    value A   value B  op
   6    1    0.08333       0.6  model.language_model.layers.2.mlp.gate_proj
   5    2        0.1       0.5  model.language_model.layers.2.self_attn.q_proj

largest differences in rank
  #A   #B    value A   value B  op
   1    6        0.5       0.1  model.language_model.layers.0.self_attn.q_proj
   6    1    0.08333       0.6  model.language_model.layers.2.mlp.gate_proj
 and 4 more (--all shows them)

not ranked in A: 7 ops (B has a value for 5: shown, the most sensitive in B
  first)
 6 ops: value 0 shared by 6 ops: probably never measured
       0.05  model.visual.blocks.2.attn.proj
       0.04  model.visual.blocks.2.attn.qkv
  and 4 more (--all shows them)
 1 op: not in the file
          -  lm_head

not ranked in B: 2 ops (nor has A a value)
 1 op: unexercised: no batch reaches it
          -  model.visual.blocks.0.attn.qkv
 1 op: failed: NaN when quantized
          -  lm_head
"""
    assert text == expected
    assert max(map(len, text.splitlines())) < 80


def test_all_shortens_nothing(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With ``--all`` every op is there, and nothing points to it."""
    text = output(capsys, [*files, "--all"])
    assert "--all" not in text
    assert all(f"model.{name}\n" in text for name in (*LANGUAGE, *VISION))


def test_json_says_the_same(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Machines get everything that people get, lists in full."""
    found: dict[str, Any] = json.loads(output(capsys, [*files, "--json", "--top", "2"]))
    assert " ".join(found) == "a b common prefix rival_prefixes ranked with_suspects top disagreements ops"
    assert {key: found["a"][key] for key in ("path", "tool", "mode", "metric", "sensitive", "ops", "with_value")} == {
        "path": "modelopt.json",
        "tool": "ModelOpt AutoQuantize",
        "mode": "isolated",
        "metric": "sensitivity",
        "sensitive": "larger",
        "ops": 12,
        "with_value": 12,
    }
    assert found["a"]["shared"] == [{"value": 0.0, "ops": VISION, "suspect": True}]
    assert found["a"]["not_ranked"][0] == {
        "op": "model.visual.blocks.2.attn.proj",
        "why": "value 0 shared by 6 ops: probably never measured",
        "other_value": 0.05,
    }
    assert len(found["a"]["not_ranked"]) == 7
    assert found["prefix"] == {"side": "a", "text": "model.", "needed_by": 12}
    assert found["common"] == 12
    assert found["ranked"] == {"ops": 6, "spearman": -1.0, "kendall_tau_b": -1.0}
    assert found["with_suspects"]["ops"] == 11
    assert found["top"]["both"] == []
    assert found["top"]["a"] == [f"model.{name}" for name in LANGUAGE[:2]]
    assert len(found["disagreements"]) == len(found["ops"]) == 6
    assert set(found["ops"][0]) == {"op", "rank_a", "rank_b", "value_a", "value_b"}


def test_modes_metrics_and_infinity(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options choose for our file, a mode unlike the other's is pointed out, and infinite decibels are no NaN."""
    text = output(capsys, [*files, "--mode", "fallback", "--metric", "gain"])
    assert "   gain, fallback (everything quantized but this op)\n   LARGER means" in text
    assert "note: A is isolated and B fallback: two questions, whose answers can differ\n" in text
    text = output(capsys, [*files, "--mode", "fallback"])
    assert "   nmse, fallback (everything quantized but this op)\n   SMALLER means" in text
    assert "5 ops share the value 0.95: ranked as equals" in text
    decibels = [measured(name, value, sqnr_db=db) for name, value, db in (("a", 0, None), ("b", 0.1, 10), ("c", 1, 0))]
    path = str(results(tmp_path / "db.json", decibels))
    text = output(capsys, ["compare", path, path, "--metric", "sqnr_db"])
    assert "   3    3   infinite  infinite  a\n" in text
    assert "no op has different ranks\n" in text
    found = json.loads(output(capsys, ["compare", path, path, "--metric", "sqnr_db", "--json"]))
    assert found["ops"][2]["value_a"] is None


def test_names_and_directions_of_neural_compressor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Small means sensitive in its fallback scores as in ours, and its ``.module`` is no part of a name."""
    theirs = {f"{op.op}.module": 5.0 + index for index, op in enumerate(OURS[:5])}
    inc = neural_compressor(tmp_path / "inc.json", theirs, {})
    text = output(capsys, ["compare", str(inc), str(results(tmp_path / "ours.json", OURS))])
    assert "5 common ops (names as they are), 5 of them ranked in both files" in text
    assert text.count("   SMALLER means a more sensitive op\n") == 2
    assert "  ops ranked in both      5     -1.000         -1.000\n" in text


def test_ambiguous_prefixes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where names could be of the encoder or of the decoder, none is guessed, and the reader learns it."""
    short = model_opt(tmp_path / "a.json", {"x": 1.0, "y": 2.0, "z": 3.0, **{f"{i}.q": 4.0 + i for i in range(4)}})
    names = [f"{part}.{i}.q" for part in ("enc", "dec") for i in range(4)]
    full = model_opt(tmp_path / "b.json", {"x": 1.0, "y": 2.0, "z": 3.0, **{n: 4.0 + i for i, n in enumerate(names)}})
    text = output(capsys, ["compare", str(short), str(full)])
    assert "3 common ops (names as they are; several prefixes would match equally many" in text
    found = json.loads(output(capsys, ["compare", str(short), str(full), "--json"]))
    assert found["prefix"] is None
    assert found["rival_prefixes"] == [{"side": "a", "text": "dec."}, {"side": "a", "text": "enc."}]


def test_bad_input_ends_in_one_line_and_code_4(files: list[str], tmp_path: Path) -> None:
    """Bad files end in 4 and a line on stderr, a wrong command line in argparse's 2; torch is never loaded."""
    (tmp_path / "bad.json").write_text("{")
    script = "import sys; from pytest_qsens.cli import main; sys.exit(main() + 50 * ('torch' in sys.modules))"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    process = run("compare", "ours.json", "bad.json")
    assert (process.returncode, process.stdout) == (4, "")
    assert process.stderr.startswith("qsens: bad.json, line 1: malformed JSON")
    assert process.stderr.count("\n") == 1
    assert run(*files).returncode == 0
    for wrong in (["compare", "ours.json"], [*files, "--top", "0"], [*files, "--top", "x"], [*files, "--mode", "x"]):
        process = run(*wrong)
        assert process.returncode == 2
        assert "usage: qsens" in process.stderr
