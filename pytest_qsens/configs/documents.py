"""A config file as plain values, whatever its syntax: JSON, YAML, TOML or lines of text."""

from __future__ import annotations

import json
import stat
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import yaml

from pytest_qsens.errors import QsensError
from pytest_qsens.files import parse_json, read_text

if TYPE_CHECKING:
    from pathlib import Path

Syntax = Literal["JSON", "YAML", "TOML", "text"]

SUFFIXES: dict[str, Syntax] = {
    ".json": "JSON",
    ".yaml": "YAML",
    ".yml": "YAML",
    ".toml": "TOML",
    ".txt": "text",
}
"""End of a file's name → what it says of the syntax."""

MAX_BYTES = 16 * 2**20
MAX_VALUES = 1_000_000
"""Values of a YAML document with every alias written out; one of a few lines can stand for billions."""


@dataclass(frozen=True)
class Document:
    """A file, and the value that it holds (for ``text`` its lines)."""

    path: Path
    syntax: Syntax
    value: Any


def read_document(path: Path) -> Document:
    """Read a file; a name that ends in ``.json``, ``.yaml``, ``.yml``, ``.toml`` or ``.txt`` says what it is.

    Raises:
        QsensError: If it is missing, no file, too large, empty, no UTF-8, or malformed; with the line where there is
            one.

    """
    _check(path)
    text = read_text(path)
    if text is None:
        raise QsensError(f"there is no file {path}")
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise QsensError(f"{path} is empty. Give a quantization config; docs/configs.md lists the formats.")
    return parse_document(text, path, _syntax(path, text))


def parse_document(text: str, path: Path, syntax: Syntax) -> Document:
    """Make a document of a text.

    Raises:
        QsensError: If it is malformed; with the line where there is one.

    """
    return Document(path, syntax, _PARSERS[syntax](text, path))


def _check(path: Path) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise QsensError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise QsensError(f"{path} is a directory. Give the config file in it.")
    if not stat.S_ISREG(status.st_mode):  # reading a device or a pipe may have no end
        raise QsensError(f"{path} is not a regular file. Give a file.")
    if status.st_size > MAX_BYTES:
        raise QsensError(f"{path} has {status.st_size} bytes: no quantization config has more than {MAX_BYTES}.")


def _syntax(path: Path, text: str) -> Syntax:
    known = SUFFIXES.get(path.suffix.lower())
    if known is not None:
        return known
    start = text.lstrip()[:1]
    if start == "/":  # a name of an ONNX node
        return "text"
    if start in "{[":
        try:
            tomllib.loads(text)  # a TOML file can begin with a table, a JSON file is never TOML
        except (ValueError, RecursionError):
            return "JSON"
        return "TOML"
    try:
        tomllib.loads(text)
    except (ValueError, RecursionError):
        return "YAML"
    return "TOML"


def _json(text: str, path: Path) -> Any:  # noqa: ANN401  # JSON is whatever it is
    return parse_json(text, path, constants=True)


def _toml(text: str, path: Path) -> Any:  # noqa: ANN401  # as above
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise QsensError(f"{path}: malformed TOML ({error})") from error


def _lines(text: str, path: Path) -> list[str]:  # noqa: ARG001  # one signature for all syntaxes
    return [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML's plain values, and Python's tuples, which Intel Neural Compressor writes; nothing else is constructed."""

    yaml_constructors = {  # noqa: RUF012  # PyYAML's own way
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in {"null", "bool", "int", "float", "str", "seq", "map"}
    }
    yaml_implicit_resolvers = {  # noqa: RUF012  # dates are text
        start: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _tuple(loader: yaml.SafeLoader, node: yaml.Node) -> tuple[object, ...]:
    if not isinstance(node, yaml.SequenceNode):
        raise yaml.constructor.ConstructorError(None, None, "a tuple is a sequence", node.start_mark)
    return tuple(loader.construct_object(child, deep=True) for child in node.value)


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)


def _yaml(text: str, path: Path) -> Any:  # noqa: ANN401  # as above
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise QsensError(f"{path} is empty. Give a quantization config; docs/configs.md lists the formats.")
            _check_nodes(node, path)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise QsensError(f"{path}{line}: malformed YAML ({error.problem or error.context})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise QsensError(f"{path}: malformed YAML ({_one_line(error)})") from error
    except (ValueError, TypeError, LookupError) as error:  # a tag before what is none of its kind; a list as a key
        raise QsensError(f"{path}: malformed YAML, a value is not what it says it is ({_one_line(error)})") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_nodes(root: yaml.Node, path: Path) -> None:
    """Refuse keys given twice, and documents that alias themselves or grow without bounds."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        key = id(node)
        if key in sizes:
            return sizes[key]
        line = node.start_mark.line + 1
        if key in open_nodes:
            raise QsensError(f"{path}, line {line}: a YAML anchor contains itself. Write the value out.")
        open_nodes.add(key)
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(node, path)
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        total = 1 + sum(map(size, children))
        open_nodes.discard(key)
        if total > MAX_VALUES:
            raise QsensError(
                f"{path}, line {line}: more than {MAX_VALUES} values once its YAML aliases are written out. "
                "No quantization config is that long."
            )
        sizes[key] = total
        return total

    size(root)


def _refuse_twice(node: yaml.MappingNode, path: Path) -> None:
    seen: set[tuple[object, ...]] = set()
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        plain = _plain(key)
        if plain in seen:
            raise QsensError(
                f"{path}, line {key.start_mark.line + 1}: {plain[-1]!r} is there twice. Keep one of the two entries."
            )
        seen.add(plain)


def _plain(node: yaml.Node) -> tuple[object, ...]:
    """Make a key something that equals itself."""
    if isinstance(node, yaml.SequenceNode):
        return (node.tag, tuple(map(_plain, node.value)))
    return (node.tag, node.value) if isinstance(node, yaml.ScalarNode) else (node.tag, id(node))


_PARSERS: dict[str, Any] = {"JSON": _json, "YAML": _yaml, "TOML": _toml, "text": _lines}


def as_text(value: object) -> str:
    """Short text of a value of a document, for messages."""
    if isinstance(value, str):
        text = repr(value)
    else:
        try:
            text = json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
