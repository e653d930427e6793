"""What is missing for an engine is said before anything is loaded."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.engines import availability
from pytest_qsens.engines.availability import check_engine
from pytest_qsens.errors import QsensError
from tests.plugin.harness import MODEL, write_model

if TYPE_CHECKING:
    from collections.abc import Mapping

INSTALL = r"pip install 'pytest-qsens\[inc\]'"


def pretend(monkeypatch: pytest.MonkeyPatch, versions: Mapping[str, str], *, missing: tuple[str, ...] = ()) -> None:
    """Let these be the installed versions."""

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(availability, "version", version)
    monkeypatch.setattr(availability, "find_spec", lambda name: None if name in missing else object())


@pytest.mark.parametrize("engine", ["auto", "replay", "eager"])
@pytest.mark.parametrize(("scheme", "device"), [("w8a8", "cpu"), ("w8a8_dynamic", "cuda:1")])
def test_simulating_engines_need_nothing(engine: str, scheme: str, device: str) -> None:
    """Engines without kernels measure every scheme on every device."""
    check_engine(engine, scheme, device)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_fx_needs_a_scheme_with_kernels(device: str) -> None:
    """Torch's kernels execute one scheme."""
    check_engine("fx", "w8a8", device)
    with pytest.raises(QsensError, match="engine fx measures scheme w8a8 only, not 'w8a8_static'"):
        check_engine("fx", "w8a8_static", device)


@pytest.mark.parametrize("engine", ["fx", "inc"])
def test_kernels_are_those_of_the_cpu(engine: str) -> None:
    """Another device is refused by name."""
    with pytest.raises(QsensError, match=f"engine {engine} .* not of device 'cuda:0'"):
        check_engine(engine, "w8a8", "cuda:0")


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("2.5", "not 2.5, which is too old"),
        ("2.5.1", "not 2.5.1, which is too old"),
        ("3.8", "not 3.8, which has no MSE_V2 strategy any more"),
        ("3.8.1", "not 3.8.1, which has no MSE_V2 strategy any more"),
        ("3.8.dev1", "no MSE_V2 strategy any more"),
    ],
)
def test_wrong_version(monkeypatch: pytest.MonkeyPatch, version: str, why: str) -> None:
    """The message names the version, what is wrong with it, and what to install."""
    pretend(monkeypatch, {"neural-compressor": version, "numpy": "1.26.4"})
    with pytest.raises(QsensError, match=why) as error:
        check_engine("inc", "w8a8", "cpu")
    assert error.match(INSTALL)


@pytest.mark.parametrize("version", ["2.6", "2.6.1", "3.7.1", "3.7.1.post1"])
def test_right_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Versions that have the strategy pass."""
    pretend(monkeypatch, {"neural-compressor": version, "numpy": "1.26.4"})
    check_engine("inc", "w8a8", "cpu")


def test_numpy_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A numpy that it cannot run with is named with its version."""
    pretend(monkeypatch, {"neural-compressor": "3.7.1", "numpy": "2.1.0"})
    with pytest.raises(QsensError, match=f"needs numpy<2, not 2.1.0. .*{INSTALL}"):
        check_engine("inc", "w8a8", "cpu")


@pytest.mark.parametrize("missing", [("six",), ("pkg_resources",), ("six", "pkg_resources")])
def test_undeclared_imports(monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]) -> None:
    """What it imports without declaring it is named, all at once."""
    pretend(monkeypatch, {"neural-compressor": "3.7.1", "numpy": "1.26.4"}, missing=missing)
    with pytest.raises(QsensError, match=f"imports {' and '.join(missing)}, not installed. .*{INSTALL}"):
        check_engine("inc", "w8a8", "cpu")


def run(pytester: pytest.Pytester, *options: str) -> str:
    """Run pytest on a small model, which must end as a usage error before the model is built; return its errors."""
    write_model(pytester)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--qsens-model", MODEL, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    return "\n".join(result.outlines + result.errlines)


@pytest.mark.skipif(find_spec("neural_compressor") is not None, reason="Intel Neural Compressor is installed")
def test_absent_package_is_a_usage_error(pytester: pytest.Pytester) -> None:
    """Without Intel Neural Compressor, engine inc ends with exit code 4, and says what to install and up to where."""
    text = run(pytester, "--qsens-engine", "inc")
    assert "neural-compressor 2.6 to 3.7.x" in text
    assert "not installed" in text
    assert "pip install 'pytest-qsens[inc]'" in text
    assert not (pytester.path / "built.log").exists()


@pytest.mark.parametrize("engine", ["fx", "inc"])
def test_wrong_scheme_is_a_usage_error(pytester: pytest.Pytester, engine: str) -> None:
    """A scheme without kernels ends with exit code 4."""
    text = run(pytester, "--qsens-engine", engine, "--qsens-scheme", "w8a8_dynamic")
    assert f"engine {engine} measures scheme w8a8 only" in text
