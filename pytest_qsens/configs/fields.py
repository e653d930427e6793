"""Objects of a config, read key by key; what is not read, and what changes numbers, becomes a problem."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.rules import Problem
from pytest_qsens.errors import QsensError
from pytest_qsens.files import Fields, typed

if TYPE_CHECKING:
    from collections.abc import Iterable


class ConfigFields(Fields):
    """One object of a config. Problems go into a list that all objects of a file share."""

    __slots__ = ("problems",)

    def __init__(self, value: object, where: str, problems: list[Problem]) -> None:
        """Take ``value`` if it is an object.

        Raises:
            QsensError: If it is not.

        """
        super().__init__(value, where)
        self.problems = problems

    def unread(self) -> list[str]:
        """Keys that were not read yet."""
        return list(self._rest)

    def peek(self, key: str) -> object:
        """Value of ``key``, which stays to be read; ``None`` if absent."""
        return self._rest.get(key)

    def inner(self, key: str) -> ConfigFields | None:
        """Object under ``key``, or ``None`` if there is none."""
        value = self.take(key)
        return None if value is None else ConfigFields(value, self.at(key), self.problems)

    def flag(self, key: str, default: bool) -> bool:
        """Value of ``key``, true or false."""
        value = self.take(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise QsensError(f"{self.at(key)}: true or false is needed, found {as_text(value)}")
        return value

    def integer(self, key: str) -> int | None:
        """Value of ``key``, a whole number of at most nine digits, or absent."""
        value = self.take(key)
        if value is None:
            return None
        if type(value) is not int or abs(value) >= 10**9:
            raise QsensError(f"{self.at(key)}: a whole number is needed, found {as_text(value)}")
        return value

    def known(self, key: str, choices: Iterable[str], default: str) -> str:
        """Value of ``key`` in small letters, one of ``choices``."""
        value = self.optional_text(key)
        if value is None:
            return default
        if value.lower() not in choices:
            raise QsensError(f"{self.at(key)}: {value!r} is not one of {', '.join(choices)}")
        return value.lower()

    def texts_of(self, key: str) -> list[tuple[str, str]]:
        """Texts of a list, or one text alone, each with its place; empty if absent."""
        value = self.take(key)
        if value is None:
            return []
        if isinstance(value, str):
            return [(value, self.at(key))]
        entries = typed(value, list, self.at(key))
        places = [f"{self.at(key)}, entry {number}" for number in range(1, len(entries) + 1)]
        return [(typed(entry, str, place), place) for entry, place in zip(entries, places, strict=True)]

    def objects(self, key: str) -> list[ConfigFields]:
        """Objects of a list; empty if absent."""
        value = self.take(key)
        entries = [] if value is None else typed(value, list, self.at(key))
        return [
            ConfigFields(entry, f"{self.at(key)}, entry {number}", self.problems)
            for number, entry in enumerate(entries, 1)
        ]

    def table(self, key: str) -> list[tuple[str, object, str]]:
        """Entries of an object whose keys are texts, each with its place; empty if absent."""
        value = self.take(key)
        if value is None:
            return []
        entries = typed(value, dict, self.at(key))
        return [
            (typed(name, str, self.at(key)), entry, f"{self.at(key)}, {as_text(name)}")
            for name, entry in entries.items()
        ]

    def problem(self, key: str, message: str) -> None:
        """Note something about ``key``."""
        self.problems.append(Problem(self.at(key), message))

    def changes_numbers(self, key: str, what: str, *harmless: object) -> None:
        """Note a field that has an effect on scores and that is not simulated, unless its value is one without."""
        value = self.take(key)
        if value is None or any(type(value) is type(none) and value == none for none in harmless):
            return
        self.problem(key, f"{as_text(value)} changes numbers and is not simulated: {what}")

    def skip(self, *keys: str) -> None:
        """Read keys that have no effect on scores."""
        for key in keys:
            self.take(key)

    def finish(self) -> None:
        """Note every key that was not read."""
        for key, value in self._rest.items():
            name = key if isinstance(key, str) else as_text(key)
            self.problem(name, f"unknown key (value {as_text(value)}): what it does is not known, so it is left out")
        self._rest = {}
