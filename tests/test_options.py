"""Options from the command line, ini files of every kind, and markers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_qsens import QsensError
from pytest_qsens.options import Options


def options(pytester: pytest.Pytester, *args: str) -> Options:
    """Read the options of a run in pytester's directory."""
    return Options.from_config(pytester.parseconfig(*args))


INI = """
[pytest]
qsens_model = minilm
qsens_max_ops = 2
qsens_ops =
    a.*
    b.*
qsens_no_cache = true
qsens_json = out.json
qsens_fail_overrides = total = nmse:1%
"""

TOML = """
[tool.pytest.ini_options]
qsens_model = "minilm"
qsens_max_ops = 2
qsens_ops = ["a.*", "b.*"]
qsens_no_cache = true
qsens_json = "out.json"
qsens_fail_overrides = ["total = nmse:1%"]
"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pytest.ini", INI),
        ("pyproject.toml", TOML),
        pytest.param(
            "pyproject.toml",
            TOML.replace(".ini_options", ""),
            marks=pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest reads native types since 9.0"),
        ),
    ],
    ids=["ini", "toml", "native"],
)
def test_every_ini_file_gives_the_same(pytester: pytest.Pytester, name: str, content: str) -> None:
    """Numbers, truth values and lists are written as each format writes them."""
    pytester.path.joinpath(name).write_text(content)
    found = options(pytester)
    assert found.model == "minilm"
    assert found.max_ops == 2
    assert found.ops == ("a.*", "b.*")
    assert found.no_cache is True
    assert found.allow_pickle is False
    assert found.json == pytester.path / "out.json"
    assert found.fail_overrides == ("total = nmse:1%",)


def test_the_command_line_wins(pytester: pytest.Pytester) -> None:
    """What is typed replaces what is written down, whole lists included."""
    pytester.path.joinpath("pytest.ini").write_text(INI)
    found = options(pytester, "--qsens-max-ops=3", "--qsens-ops=c", "-o", "qsens_json=other.json")
    assert found.max_ops == 3
    assert found.ops == ("c",)
    assert found.json == pytester.path / "other.json"


@pytest.mark.parametrize("key", ["qsens_model", "qsens_json", "qsens_snapshot_dir", "qsens_ops", "qsens_fail"])
def test_an_empty_ini_value_is_none(pytester: pytest.Pytester, key: str) -> None:
    """An ini file has no other way to take back a value, and nothing that could be unset."""
    pytester.makeini(f"[pytest]\n{key} =")
    assert options(pytester) == options(pytester, "-c", "/dev/null", f"--rootdir={pytester.path}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("qsens_max_ops = 0", "qsens_max_ops in the ini file takes a whole number from 1, not "),
        ("qsens_max_ops = few", "qsens_max_ops in the ini file takes a whole number from 1.*'few'"),
        ("qsens_no_cache = maybe", "qsens_no_cache in the ini file takes true or false: .*maybe"),
        ("qsens_fail = nmsd:5%", "qsens_fail in the ini file 'nmsd:5%': no metric 'nmsd'"),
        ("qsens_device = gpu 1", "qsens_device in the ini file takes a torch device"),
    ],
)
def test_the_ini_file_is_named(pytester: pytest.Pytester, line: str, message: str) -> None:
    """Where a value stands is where it has to be mended."""
    pytester.makeini(f"[pytest]\n{line}")
    with pytest.raises(QsensError, match=message):
        options(pytester)


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest reads native types since 9.0")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("qsens_max_ops = true", "qsens_max_ops in the ini file takes a whole number from 1: .* got bool"),
        ("qsens_model = 3", "qsens_model in the ini file takes a text: .* got int"),
        ("qsens_json = 3", "qsens_json in the ini file takes a path: .* got int"),
        ("qsens_ops = 3", "qsens_ops in the ini file takes a list of texts: .* got int"),
        ("qsens_no_cache = 1", "qsens_no_cache in the ini file takes true or false: .* got int"),
        ("qsens_fail_overrides = 1", "qsens_fail_overrides in the ini file takes a list of texts: .* got int"),
    ],
)
def test_native_types_are_checked(pytester: pytest.Pytester, line: str, message: str) -> None:
    """A native TOML value of another type is refused with its key."""
    pytester.path.joinpath("pyproject.toml").write_text(f"[tool.pytest]\n{line}")
    with pytest.raises(QsensError, match=message):
        options(pytester)


@pytest.mark.parametrize("option", ["model", "json", "snapshot-dir", "cache", "checkpoint", "calib", "ops", "fail"])
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_option_is_refused(pytester: pytest.Pytester, option: str, value: str) -> None:
    """An unset shell variable never means the current directory."""
    with pytest.raises(QsensError, match=rf"^--qsens-{option} is empty\. Is a variable in it not set\?"):
        options(pytester, f"--qsens-{option}", value)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"model": 3}, "model= of @pytest.mark.qsens takes a text, not 3"),
        ({"model": b"net:spec"}, "model= of @pytest.mark.qsens takes a text, not b'net:spec'"),
        ({"model": ""}, "model= of @pytest.mark.qsens is empty"),
        ({"ops": 3}, "ops= of @pytest.mark.qsens takes a list of texts, not 3"),
        ({"ops": ["a", None]}, "ops= of @pytest.mark.qsens takes a list of texts, not None"),
        ({"fail": 5}, "fail= of @pytest.mark.qsens takes a text, not 5"),
        ({"fail": "nmse"}, "fail= of @pytest.mark.qsens 'nmse': '' is not an amount for nmse"),
        ({"calib": 3}, "calib= of @pytest.mark.qsens takes a path, not 3"),
        ({"max_ops": 2.0}, "max_ops= of @pytest.mark.qsens takes a whole number from 1, not 2.0"),
        ({"max_ops": True}, "max_ops= of @pytest.mark.qsens takes a whole number from 1, not True"),
        ({"max_ops": "9" * 5000}, "max_ops= of @pytest.mark.qsens takes a whole number from 1"),
        ({"allow_pickle": "no"}, "allow_pickle= of @pytest.mark.qsens takes true or false, not 'no'"),
        ({"allow_pickle": 1}, "allow_pickle= of @pytest.mark.qsens takes true or false, not 1"),
        ({"scheme": ["w8a8"]}, r"scheme= of @pytest.mark.qsens takes a text, not \['w8a8'\]"),
    ],
)
def test_wrong_types_in_a_marker(pytester: pytest.Pytester, keywords: dict[str, Any], message: str) -> None:
    """Code can give anything: what no option can be is refused, and no text is taken for true."""
    with pytest.raises(QsensError, match=f"^{message}"):
        options(pytester).override(keywords)


def test_right_types_in_a_marker(pytester: pytest.Pytester) -> None:
    """One glob or several, paths as objects, and ``None`` for what the run says."""
    found = options(pytester, "--qsens-scheme=w8a8_static").override(
        {"ops": "a", "max_ops": 2, "calib": Path("data.txt"), "allow_pickle": True, "scheme": None}
    )
    assert found.ops == ("a",)
    assert found.max_ops == 2
    assert found.calib == pytester.path / "data.txt"
    assert found.allow_pickle is True
    assert found.scheme == "w8a8_static"
    assert found.override({"ops": ("a", "b")}).ops == ("a", "b")
