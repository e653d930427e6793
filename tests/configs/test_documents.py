"""Files that cannot be read, and syntaxes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_qsens.configs.documents import MAX_BYTES, read_document
from pytest_qsens.configs.read import read_config
from pytest_qsens.errors import QsensError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{letter}: &{letter} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, letter in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "is empty"),
        ("a.yaml", b" \n# nothing\n", "is empty"),
        ("a.yaml", b"--- \n", "unknown format, found null"),
        ("a.json", b'{"rules": [', r"line 1: malformed JSON"),
        ("a.json", b'{"rules": 1, "rules": 2}', "'rules' is there twice"),
        ("a.json", b"[" * 100_000, "malformed JSON"),
        ("a.json", b'{"a": ' + b"1" * 5000 + b"}", "malformed JSON"),
        ("a.yaml", b"rules: [", "line 1: malformed YAML"),
        ("a.yaml", b"rules: 1\nschema: 1\nrules: 2\n", "line 3: 'rules' is there twice"),
        ("a.yaml", b"op:\n  ? [a, b]\n  : 1\n  ? [a, b]\n  : 2\n", "line 4: .* is there twice"),
        ("a.yaml", b"a: &a [*a]\n", "line 1: a YAML anchor contains itself"),
        ("a.yaml", LAUGHS.encode(), "values once its YAML aliases are written out"),
        ("a.yaml", b"[" * 5_000, "malformed YAML"),
        ("a.yaml", b"a: !!python/object/apply:os.system [ls]\n", "line 1: malformed YAML .*os.system"),
        ("a.yaml", b"a: !!python/name:os.system\n", "line 1: malformed YAML"),
        ("a.yaml", b"a: !!int abc\n", "a value is not what it says it is"),
        ("a.yaml", b"a: !!bool abc\n", "a value is not what it says it is"),
        ("a.yaml", b"a: !!python/tuple abc\n", "a tuple is a sequence"),
        ("a.yaml", b"{!!python/tuple [[a]]: 1}\n", "malformed YAML"),
        ("a.yaml", b"{[a]: 1}\n", "unhashable"),
        ("a.yaml", b"a: 1\n---\nb: 2\n", "malformed YAML"),
        ("a.yaml", b"a: \x01\n", "malformed YAML"),
        ("a.toml", b"rules = [", "malformed TOML"),
        ("a.toml", b"a = 1\na = 2\n", "malformed TOML"),
        ("a.json", b"\xff\xfe{}", "is not UTF-8 text"),
        ("a.json", b"{}", "unknown format, found an object without keys"),
        ("a.json", b"3", r"\(JSON\): unknown format, found 3"),
        ("a.txt", b"hello\nworld\n", "unknown format"),
        ("a.json", b'{"layer_sensitivity": []}', "is a list of sensitivities .*`qsens compare` reads it"),
        ("a.json", b'{"rules": [], "quant_cfg": []}', "can be qsens and modelopt. Choose with --format"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Each of them says what is wrong, where, in one line that begins with the path."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(QsensError, match=message) as caught:
        read_config(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    """A directory, a device, a pipe, nothing, a name that cannot be, a huge file: an error at once."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    for path, message in (
        (tmp_path, "is a directory"),
        (Path("/dev/zero"), "is not a regular file"),
        (pipe, "is not a regular file"),
        (tmp_path / "none.json", "there is no file"),
        (tmp_path / "a\0b", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (huge, "no quantization config has more"),
    ):
        with pytest.raises(QsensError, match=message):
            read_document(path)


@pytest.mark.parametrize(
    ("name", "text", "syntax"),
    [
        ("a", '{"a": 1}', "JSON"),
        ("a", "a: 1\n", "YAML"),
        ("a", "a = 1\n", "TOML"),
        ("a", "[a]\nb = 1\n", "TOML"),
        ("a", "/layers.0/fc1/MatMul\n", "text"),
        ("a.yml", '{"a": 1}', "YAML"),
        ("a.JSON", '\ufeff{"a": 1}', "JSON"),
        ("a.txt", "# comment\n\n/x/MatMul\n", "text"),
    ],
)
def test_syntax_is_told_by_name_or_content(tmp_path: Path, name: str, text: str, syntax: str) -> None:
    """A known ending decides, else what the text looks like."""
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert read_document(path).syntax == syntax


def test_yaml_values_are_plain(tmp_path: Path) -> None:
    """Tuples are those of Python, aliases are written out, merged keys do not count as given twice, dates are text."""
    path = tmp_path / "a.yaml"
    path.write_text("? !!python/tuple [fc1, Linear]\n: &x {a: 1, b: 2024-01-01}\ny: {<<: *x, a: 2}\n")
    assert read_document(path).value == {
        ("fc1", "Linear"): {"a": 1, "b": "2024-01-01"},
        "y": {"a": 2, "b": "2024-01-01"},
    }
