"""What is given for one option, checked by itself: text of the command line, of the ini file or of the marker."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qsens.configs.names import FORMATS
from pytest_qsens.errors import QsensError, unknown
from pytest_qsens.groups import GRANULARITIES
from pytest_qsens.option_declarations import ENGINES, MODES
from pytest_qsens.quant.schemes import scheme_named
from pytest_qsens.shards import Shard

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from pytest_qsens.option_declarations import Declaration, Kind

_TAKES: dict[Kind, str] = {
    "text": "a text",
    "path": "a path",
    "count": "a whole number from 1",
    "flag": "true or false",
    "list": "a list of texts",
    "shard": "i/N, part i of N",
}


def from_ini(config: pytest.Config, key: str, kind: Kind) -> Any:  # noqa: ANN401  # one of the types in _INI_TYPES
    """Value in the ini file, or ``None`` if there is none or it is empty.

    Raises:
        QsensError: If it is not of the type that pytest was told.

    """
    try:
        given = config.getini(key)
    except (TypeError, ValueError, pytest.UsageError) as error:  # which one depends on pytest's version
        raise QsensError(f"{key} in the ini file takes {_TAKES[kind]}: {error}") from error
    return None if given in ("", []) else given


def parse(declared: Declaration, given: object, origin: str, base: Path) -> object:
    """Turn what was given into the value of the ``Options`` field; ``None`` stays for options not given."""
    if declared.kind == "flag":
        return _flag(given, origin)
    if given is None:
        return None
    if declared.kind == "count":
        return _count(given, origin)
    if declared.kind == "list":
        items = given if isinstance(given, list | tuple) else (given,)
        return tuple(_given_text(item, declared.kind, origin) for item in items)
    text = _given_text(given, declared.kind, origin)
    if declared.kind == "text":
        return _model_name(text, base) if declared.name == "model" else _checked(declared.name, text, origin)
    return Shard.parse(text, origin) if declared.kind == "shard" else _absolute(text, base)


def _flag(given: object, origin: str) -> bool:
    if given is None or isinstance(given, bool):
        return bool(given)
    raise QsensError(f"{origin} takes {_TAKES['flag']}, not {given!r}")


def _given_text(given: object, kind: Kind, origin: str) -> str:
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    if not isinstance(text, str):
        raise QsensError(f"{origin} takes {_TAKES[kind]}, not {given!r}")
    if not text.strip():  # as a path it would be the current directory
        raise QsensError(f"{origin} is empty. Is a variable in it not set?")
    return text


def _checked(name: str, text: str, origin: str) -> str:
    if check := _CHECKS.get(name):
        check(text, origin)
    return text


def _count(given: object, origin: str) -> int:
    text = str(given)
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
        raise QsensError(f"{origin} takes {_TAKES['count']}, not {given!r}")
    return int(text)


def _absolute(text: str, base: Path) -> Path:
    # Not resolve(): the user's spelling of a symlinked checkpoint is what messages should show.
    return Path(os.path.normpath(base / Path(text).expanduser()))


def _model_name(text: str, base: Path) -> str:
    """Make a directory absolute, so that every process means the same one; leave other kinds of names alone.

    A bare word is a directory only if it is one here and no preset.
    """
    if ":" in text:  # hub:org/name or package.module:factory
        return text
    path = _absolute(text, base)
    if text.startswith((".", "/", "~")) or ("/" in text and path.is_dir()):
        return str(path)
    from pytest_qsens.models.presets import PRESETS

    return str(path) if text not in PRESETS and path.is_dir() else text


def _check_choice(known: Collection[str]) -> Callable[[str, str], None]:
    def check(text: str, origin: str) -> None:
        if text not in known:
            raise QsensError(unknown(f"value for {origin}:", text, known))

    return check


def _check_scheme(text: str, origin: str) -> None:
    scheme_named(text, f"value for {origin}:")


def _check_fail(text: str, origin: str) -> None:
    from pytest_qsens.gates import parse_gates

    parse_gates(text, origin)


def _check_device(text: str, origin: str) -> None:
    if not re.fullmatch(r"[a-z]+(:[0-9]+)?", text):
        raise QsensError(f"{origin} takes a torch device such as cpu, cuda or cuda:1, not {text!r}")


def _check_duration(text: str, origin: str) -> None:
    from pytest_qsens.time_budget import parse_duration

    parse_duration(text, origin)


def _check_memory(text: str, origin: str) -> None:
    from pytest_qsens.memory import parse_memory

    parse_memory(text, origin)


_CHECKS: dict[str, Callable[[str, str], None]] = {
    "scheme": _check_scheme,
    "config_format": _check_choice(FORMATS),
    "config_down": _check_scheme,
    "config_problems": _check_choice(("error", "warn")),
    "mode": _check_choice(MODES),
    "granularity": _check_choice(GRANULARITIES),
    "engine": _check_choice(ENGINES),
    "fail": _check_fail,
    "device": _check_device,
    "memory": _check_memory,
    "time_budget": _check_duration,
    "cache_size": _check_memory,
}
