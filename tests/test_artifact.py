"""What one process finds out and others read: the same scores, and nothing believed that is damaged or stale."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_qsens import engine_setup, preparation
from pytest_qsens.artifact import Artifact, Content
from pytest_qsens.calibrated import calibrate
from pytest_qsens.engines.delta import DeltaEngine
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.groups import grouped
from pytest_qsens.ops import Op
from tests.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from pytest_qsens.calibrated import CalibratedModel
    from pytest_qsens.results import OpResult

SCHEMES = ("w8a8", "w8a8_static")
HEAD = Op("lm_head", "linear")


def artifact(directory: Path, key: str = "k") -> Artifact:
    """Return the artifact of a test."""
    return Artifact(directory / "artifacts" / "one", key, "tiny")


def measured(model: CalibratedModel, every: int = 3) -> list[OpResult]:
    """Scores of some ops, in both modes, and of the model."""
    ops = list_ops(ARCHITECTURES["qwen2_5_vl"].build())[::every]
    return [model.score(op, ("isolated", "fallback")) for op in ops] + [model.total()]


def scores(results: list[OpResult]) -> list[Any]:
    """All that does not depend on the clock."""
    return [(result.op, result.status, result.reason, result.modes) for result in results]


def made(directory: Path, scheme: str = "w8a8", **changes: Any) -> CalibratedModel:  # noqa: ANN401 - of `calibrate`
    """Calibrate a fresh model with the artifact of a directory."""
    spec = ARCHITECTURES["qwen2_5_vl"].spec()
    ops = list_ops(spec.model)  # type: ignore[arg-type] # a module
    options: dict[str, Any] = {"artifact": artifact(directory), "memory": 10**9, **changes}
    return calibrate(spec, ops, scheme, **options)


def refuse(*_: object, **__: object) -> Any:  # noqa: ANN401 - never returns
    """Stand in for what must not run."""
    raise AssertionError("prepared anew")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_others_run_a_graph_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """No calibration, no capture, no self-check; every number as without an artifact."""
    alone = made(tmp_path, scheme, artifact=None)
    expected = scores(measured(alone))
    first = made(tmp_path, scheme)
    monkeypatch.setattr(engine_setup, "prepare", refuse)
    monkeypatch.setattr(preparation, "run_model", refuse)
    monkeypatch.setattr("pytest_qsens.engines.delta.DeltaEngine._find_verdict", refuse)
    second = made(tmp_path, scheme)
    assert scores(measured(first)) == scores(measured(second)) == expected
    assert second.reference_digest == alone.reference_digest
    assert second.functional_ops == alone.functional_ops
    assert second.reference_seconds == first.reference_seconds


def test_a_verdict_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where differences are not to be trusted, nobody uses them."""
    monkeypatch.setattr("pytest_qsens.engines.delta.TOLERANCE", -1.0)
    first = made(tmp_path)
    monkeypatch.undo()
    second = made(tmp_path)
    assert (second.engine, second.engine_reason) == (first.engine, first.engine_reason)
    assert second.engine == "replay"
    assert "exact replay" in (second.engine_reason or "")


def test_what_was_not_compared_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that had no use for differences, or made logits of them, says nothing about their errors."""
    made(tmp_path / "replay", engine="replay")
    made(tmp_path / "logits", divergence=True)
    made(tmp_path / "few", divergence=False, expected=[HEAD])
    monkeypatch.setattr("pytest_qsens.engines.delta.TOLERANCE", -1.0)
    for name, engine in (("replay", "replay"), ("logits", "replay"), ("few", "delta")):
        model = made(tmp_path / name, divergence=False)
        measured(model, 20)
        assert model.engine == engine, name


def test_groups_are_compared_for_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found out of single ops says nothing of groups, and what was found out of groups nothing of ops."""
    groups = grouped(list_ops(ARCHITECTURES["qwen2_5_vl"].build()), "fused")
    made(tmp_path / "ops", divergence=False)
    made(tmp_path / "groups", divergence=False, expected=groups)
    monkeypatch.setattr("pytest_qsens.engines.delta.TOLERANCE", -1.0)
    for name, expected, engine in (
        ("ops", groups, "replay"),
        ("ops", None, "delta"),
        ("groups", groups, "replay"),
        ("groups", None, "delta"),
    ):
        model = made(tmp_path / name, divergence=False, expected=expected)
        for op in groups[:9]:
            model.score(op, ["isolated"])
        assert model.engine == engine, name


def test_a_few_ops_are_not_checked_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ends of the model are compared, whatever is going to be scored: others believe it."""
    compared: list[tuple[str, ...]] = []
    true = DeltaEngine._compared

    def logged(engine: DeltaEngine, unit: tuple[str, ...]) -> Any:  # noqa: ANN401 - the verdict
        compared.append(unit)
        return true(engine, unit)

    monkeypatch.setattr(DeltaEngine, "_compared", logged)
    made(tmp_path, expected=[HEAD])
    assert len(compared) == 2
    assert compared[0][0].startswith("model.visual.")
    assert compared[1] != ("lm_head",)


def test_a_passing_failure_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the process that met it replays."""

    def fail(*_: object) -> Any:  # noqa: ANN401 - never returns
        raise MemoryError("no memory")

    monkeypatch.setattr("pytest_qsens.engines.delta.Waves.score", fail)
    first = made(tmp_path)
    assert first.engine == "replay"
    assert "no memory" in (first.engine_reason or "")
    monkeypatch.undo()
    second = made(tmp_path)
    measured(second, 20)
    assert second.engine == "delta"


def test_other_calibration_data_is_noticed(tmp_path: Path) -> None:
    """Ranges are those of the batches that are there, whatever the key says."""
    spec = ARCHITECTURES["qwen2_5_vl"].spec()
    ops = list_ops(spec.model)  # type: ignore[arg-type] # a module
    calibrate(spec, ops, "w8a8", artifact=artifact(tmp_path))
    before = artifact(tmp_path).path.read_bytes()
    other = dataclasses.replace(ARCHITECTURES["qwen2_5_vl"].spec(), calibration=spec.evaluation)
    calibrate(other, ops, "w8a8", artifact=artifact(tmp_path))
    assert artifact(tmp_path).path.read_bytes() != before


def damage_end(path: Path) -> None:
    """Cut a file short."""
    os.truncate(path, path.stat().st_size - 100)


def damage_tensor(path: Path) -> None:
    """Turn one bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def damage_facts(path: Path) -> None:
    """Change a number in the metadata, and not its length."""
    content = path.read_bytes()
    assert content.count(rb"\"fault\": null") == 1
    path.write_bytes(content.replace(rb"\"fault\": null", rb"\"fault\": true"))


def damage_all(path: Path) -> None:
    """Leave an empty file."""
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_end, damage_tensor, damage_facts, damage_all])
def test_damage_is_detected_and_mended(tmp_path: Path, damage: Any) -> None:  # noqa: ANN401 - a function of the path
    """The file is made anew."""
    before = scores(measured(made(tmp_path), 9))
    path = artifact(tmp_path).path
    damage(path)
    assert artifact(tmp_path).read() is None
    assert scores(measured(made(tmp_path), 9)) == before
    assert artifact(tmp_path).read() is not None


def test_another_key_is_not_believed(tmp_path: Path) -> None:
    """A file that was copied or renamed says what it was made for."""
    made(tmp_path)
    assert artifact(tmp_path, "other").read() is None


def test_other_weights_are_noticed(tmp_path: Path) -> None:
    """The outputs of the graph are compared with those that were seen, whatever the key says."""
    made(tmp_path)
    before = artifact(tmp_path).path.read_bytes()
    spec = ARCHITECTURES["qwen2_5_vl"].spec()
    model: Any = spec.model
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 0.5
    found = calibrate(spec, list_ops(model), "w8a8", artifact=artifact(tmp_path))
    assert artifact(tmp_path).path.read_bytes() != before
    spec = ARCHITECTURES["qwen2_5_vl"].spec()
    other: Any = spec.model
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 0.5
    assert calibrate(spec, list_ops(other), "w8a8").reference_digest == found.reference_digest


def test_a_model_without_a_graph_leaves_no_artifact(tmp_path: Path) -> None:
    """Engine eager runs the model itself."""
    model = made(tmp_path, engine="eager")
    assert model.engine == "eager"
    assert not artifact(tmp_path).path.exists()


def test_a_full_disk_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores come, and nothing half-written stays."""
    true = Path.write_bytes

    def full(path: Path, content: bytes) -> None:
        true(path, content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert made(tmp_path).score(list_ops(ARCHITECTURES["qwen2_5_vl"].build())[5], ["isolated"]).status == "measured"
    assert list(artifact(tmp_path).path.parent.iterdir()) == []


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    """The next one gets the lock, and removes what the other had begun."""
    code = (
        "import sys, time, pathlib\n"
        "from pytest_qsens.artifact import Artifact\n"
        "found = Artifact(pathlib.Path(sys.argv[1]), 'k', 'tiny')\n"
        "with found.locked():\n"
        "    found.path.with_name(f'.{found.path.name}.1.tmp').write_bytes(b'begun')\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(600)\n"
    )
    found = artifact(tmp_path)
    with subprocess.Popen([sys.executable, "-c", code, str(found.entry)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        process.send_signal(signal.SIGKILL)
    start = time.monotonic()
    with found.locked():
        found.write(Content({"a": 1}, {"t": torch.ones(3)}))
    assert time.monotonic() - start < 30
    assert {path.name for path in found.entry.iterdir()} == {"calibrated.safetensors", "entry.json"}
    content = found.read()
    assert content is not None
    assert content.facts == {"a": 1}
