"""From plain values to the text of a file: YAML, TOML or JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_qsens.configs.documents import Syntax


def dump(value: dict[str, Any], syntax: Syntax) -> str:
    """Text of an object, keys in its order."""
    return _DUMPERS[syntax](value)


class Row(dict[Any, Any]):
    """An object that is written in one line, however long: what is said of one op, say."""


def _json(value: dict[str, Any]) -> str:
    return _json_value(value, "") + "\n"


def _json_value(value: object, indent: str) -> str:
    if not isinstance(value, dict | list) or not value or isinstance(value, Row):
        return json.dumps(value)
    inner = indent + "  "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_json_value(entry, inner)}" for key, entry in value.items()]
    else:
        parts = [_json_value(entry, inner) for entry in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return f"{start}\n" + ",\n".join(inner + part for part in parts) + f"\n{indent}{end}"


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """YAML without aliases, and with Python's tuples as Intel Neural Compressor writes them."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002  # PyYAML's own signature
        """Write equal values out each time."""
        return True


_Dumper.add_representer(
    tuple,
    lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:python/tuple", [*value], flow_style=True),
)
_Dumper.add_representer(
    Row, lambda dumper, value: dumper.represent_mapping("tag:yaml.org,2002:map", value.items(), flow_style=True)
)


def _yaml(value: dict[str, Any]) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=10**6)
    return text


def _toml(value: dict[str, Any]) -> str:
    return "\n".join(_toml_lines(value)) + "\n"


def _toml_lines(value: dict[str, Any]) -> Iterator[str]:
    """Lines of an object of texts, numbers, lists of texts, and lists of such objects at the end."""
    for key, entry in value.items():
        if not (isinstance(entry, list) and entry and isinstance(entry[0], dict)):
            yield f"{key} = {_toml_value(entry)}"
            continue
        for inner in entry:
            yield from ("", f"[[{key}]]")
            yield from _toml_lines(inner)


def _toml_value(value: object) -> str:
    if isinstance(value, list):
        return "[\n" + "".join(f"  {_toml_value(entry)},\n" for entry in value) + "]"
    # JSON's escapes are TOML's, but for characters beyond 16 bits and for DEL
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


_DUMPERS: dict[str, Callable[[dict[str, Any]], str]] = {"JSON": _json, "YAML": _yaml, "TOML": _toml}
