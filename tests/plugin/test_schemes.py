"""Schemes by their canonical names, from the command line to the snapshot."""

from __future__ import annotations

import json

import pytest

from tests.plugin.harness import MODEL, OPS, op_id, snapshot_file, write_model


def test_a_scheme_that_is_not_in_the_list(pytester: pytest.Pytester) -> None:
    """It has a snapshot by its name, and what it leaves as it is is told op by op."""
    write_model(pytester)
    arguments = ("--qsens-model", MODEL, "--qsens-scheme", "w3a16_g32", "-p", "no:randomly")
    first = pytester.runpytest_inprocess(*arguments, "--snapshot-update", "--qsens-json", "r.json")
    assert first.ret == 0, first.stdout.str()
    found = json.loads((pytester.path / "r.json").read_text())
    assert found["run"]["scheme"] == "w3a16_g32"
    reasons = {op["op"]: op["reason"] for op in found["ops"] if op["status"] == "unquantizable"}
    measured = {op["op"] for op in found["ops"] if op["status"] == "measured"}
    assert measured == {op for op in OPS if op.endswith("down")}
    assert reasons.keys() == set(OPS) - measured
    assert reasons["embed"] == "w3a16_g32 leaves embeddings as they are: they are int8, or not quantized"
    assert reasons["head"].endswith("a scale per 32 input features, and 16 of them cannot be divided by 32")
    assert json.loads(snapshot_file(pytester, "w3a16_g32").read_text())["ops"].keys() == measured
    assert pytester.runpytest_inprocess(*arguments).ret == 0


@pytest.mark.parametrize("scheme", ["w8a8_percentile99.9_smoothquant0.75", "w8a8_dynamic_smoothquant"])
def test_what_calibration_finds_reaches_all_workers(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Two processes measure the numbers of one; the snapshot, node ids and result carry the name."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_model(pytester)
    found = []
    for workers in ("0", "2"):
        arguments = ("--qsens-model", MODEL, "--qsens-scheme", scheme, "-n", workers, "-p", "no:randomly")
        more = ("--qsens-mode", "both", "--snapshot-update", "--qsens-cache", f"cache{workers}", "-v")
        result = pytester.runpytest_subprocess(*arguments, *more, "--qsens-json", f"r{workers}.json")
        assert result.ret == 0, result.stdout.str()
        result.stdout.fnmatch_lines([f"*{op_id('head', scheme)}*".replace("[", "[[]")])
        assert json.loads((pytester.path / f"r{workers}.json").read_text())["run"]["scheme"] == scheme
        found.append(snapshot_file(pytester, scheme).read_bytes())
        snapshot_file(pytester, scheme).unlink()
    assert found[0] == found[1]


def test_results_of_other_observers_are_not_mixed_up(pytester: pytest.Pytester) -> None:
    """Each scheme has a snapshot of its own, and scores in the cache are found under their scheme alone."""
    write_model(pytester)
    numbers = {}
    for scheme in ("w8a8", "w8a8_minmax", "w8a8_percentile95", "w8a8"):
        arguments = ("--qsens-model", MODEL, "--qsens-scheme", scheme, "-p", "no:randomly", "--snapshot-update")
        assert pytester.runpytest_inprocess(*arguments, "--qsens-json", "r.json").ret == 0
        found = json.loads((pytester.path / "r.json").read_text())["ops"]
        scores = tuple(op["isolated"]["nmse"] for op in found if op["op"] != "embed")
        assert numbers.setdefault(scheme, scores) == scores
    assert len(set(numbers.values())) == len(numbers) == 3


@pytest.mark.parametrize("engine", ["fx", "inc"])
def test_kernels_have_observers_of_their_own(pytester: pytest.Pytester, engine: str) -> None:
    """Engines that torch calibrates refuse others, and smoothing, before anything is loaded."""
    write_model(pytester)
    for scheme in ("w8a8_minmax", "w8a8_smoothquant"):
        arguments = ("--qsens-model", MODEL, "--qsens-scheme", scheme, "--qsens-engine", engine)
        result = pytester.runpytest_inprocess(*arguments)
        assert result.ret == 4
        result.stderr.fnmatch_lines([f"*engine {engine} measures scheme w8a8 only, not '{scheme}'*torch's histogram*"])


def test_a_name_with_what_is_usual_is_told_the_other(pytester: pytest.Pytester) -> None:
    """``w8a8_histogram`` is ``w8a8``: two names would be two snapshots of the same."""
    write_model(pytester)
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, "--qsens-scheme", "w8a8_histogram")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*'w8a8_histogram'*did you mean w8a8?*"])
