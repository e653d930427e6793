"""Gates that are no narrower than noise: of the last digits in mode fallback, of the samples on other data."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pytest_qsens.results import round_score
from tests.plugin.harness import LABEL, MODEL, OPS, snapshot_file, snapshot_ops, write_model

NOISY = "blocks.1.down"
"""Its noise is the largest of the model: about 0.7 % of its fallback nmse, which reaches 3 %."""


def run(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    """Run the built-in suite in this process."""
    return pytester.runpytest_inprocess("--qsens-model", MODEL, "-p", "no:randomly", *args)


def scale(pytester: pytest.Pytester, factor: float, mode: str = "fallback", metric: str = "nmse") -> None:
    """Record other scores of the noisy op than were measured."""
    content: dict[str, Any] = json.loads(snapshot_file(pytester).read_text())
    scores = content["ops"][NOISY][mode]
    scores[metric] = round_score(scores[metric] * factor)
    snapshot_file(pytester).write_text(json.dumps(content))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_within_noise_is_no_regression(pytester: pytest.Pytester, workers: str) -> None:
    """Past the threshold and within noise passes, and is named with both limits; further fails, and so does strict."""
    write_model(pytester)
    fallback = ("--qsens-mode", "fallback", "-n", workers)
    run(pytester, *fallback, "--snapshot-update").assert_outcomes(passed=len(OPS) + 1)
    scale(pytester, 1 / 1.01)
    before = snapshot_ops(pytester)
    result = run(pytester, *fallback, "--qsens-fail", "nmse:0.1%", "-q")
    assert result.ret == 0
    result.stdout.re_match_lines(
        [
            r"NOT DISTINGUISHABLE: 1 of 9 scores are past their thresholds, but no further from the snapshot than ",
            rf"  {NOISY}: fallback nmse \S+ → \S+ \(\+1.0 %, \+0.1 % is \S+, noise reaches \S+\)",
        ]
    )
    strict = run(pytester, *fallback, "--qsens-fail", "nmse:0.1% strict")
    strict.assert_outcomes(passed=len(OPS), failed=1)
    assert "NOT DISTINGUISHABLE" not in strict.stdout.str()
    run(pytester, *fallback, "--qsens-fail", "nmse:0.1%", "--snapshot-update")
    assert snapshot_ops(pytester) == before  # equal is not recorded
    scale(pytester, 1 / 1.2)
    result = run(pytester, *fallback, "--qsens-fail", "nmse:0.1%")
    result.assert_outcomes(passed=len(OPS), failed=1)
    result.stdout.re_match_lines(
        [rf"E .*worse than the snapshot of {NOISY}", r"E .* \+0.1 % is \S+, noise reaches \S+\)"]
    )


def test_isolated_scores_have_no_such_noise(pytester: pytest.Pytester) -> None:
    """On the same data every difference is the model's: the sampling error of a score does not widen its gate."""
    write_model(pytester)
    run(pytester, "--snapshot-update")
    scale(pytester, 1 / 1.01, "isolated")
    run(pytester, "--qsens-fail", "nmse:0.1%").assert_outcomes(passed=len(OPS), failed=1)


def test_standard_errors_come_with_every_score(pytester: pytest.Pytester) -> None:
    """In the result file for every op and the whole model, from the cache as well; never in a snapshot."""
    write_model(pytester)
    args = ("--qsens-mode", "both", "--qsens-json", "out.json", "--snapshot-update")
    run(pytester, *args)
    content: dict[str, Any] = json.loads((pytester.path / "out.json").read_text())
    scores = [entry[mode] for entry in content["ops"] for mode in ("isolated", "fallback")]
    for found in (*scores, content["total"]["isolated"]):
        assert found["samples"] == 4
        assert found["stderr"] > 0
    text = snapshot_file(pytester).read_text()
    assert not any(name in text for name in ("stderr", "samples", "noise"))
    assert LABEL in text


TEXTS = ("the quick fox", "a lazy dog jumps over it", "no", "what is this then", "two words", "six of them and one")


def data(pytester: pytest.Pytester, name: str, *texts: str) -> str:
    """Write a data file."""
    (pytester.path / name).write_text("\n".join(texts) + "\n")
    return name


def test_other_evaluation_data(pytester: pytest.Pytester) -> None:
    """Other samples move a score by its sampling error; other calibration data, on the same samples, are gated."""

    def measure(evaluation: str, *args: str) -> pytest.RunResult:
        chosen = ("--qsens-model", "minilm", "--qsens-ops", "encoder.layer.0.*", "--qsens-eval", evaluation)
        return pytester.runpytest_subprocess("-p", "no:randomly", *chosen, *args)

    ours, theirs = data(pytester, "a.txt", *TEXTS), data(pytester, "b.txt", *TEXTS[::-1][:4], "more of the others")
    assert measure(ours, "--snapshot-update").ret == 0
    result = measure(theirs, "--qsens-fail", "nmse:0.01%")
    passed = result.parseoutcomes()["passed"]
    assert passed > 3
    result.stdout.fnmatch_lines(["NOT DISTINGUISHABLE: * of 6 scores*", "*; evaluation * → *"])
    strict = measure(theirs, "--qsens-fail", "nmse:0.01% strict").parseoutcomes()
    assert strict["passed"] < passed
    calibration = measure(ours, "--qsens-fail", "nmse:0.01%", "--qsens-calib", data(pytester, "c.txt", "short", "text"))
    assert "NOT DISTINGUISHABLE" not in calibration.stdout.str()
    assert calibration.parseoutcomes()["failed"] >= 3

    path = pytester.path / "qsens_snapshots" / "minilm" / "w8a8.json"
    content = json.loads(path.read_text())
    del content["environment"]["evaluation"]  # as older versions wrote it
    path.write_text(json.dumps(content))
    same = measure(ours)
    assert same.ret == 0
    assert "was measured elsewhere" not in same.stdout.str()
    old = measure(theirs, "--qsens-fail", "nmse:0.01%")
    assert "NOT DISTINGUISHABLE" not in old.stdout.str()
    assert old.parseoutcomes()["failed"] == strict["failed"]
