"""What ``qsens config`` prints."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pytest_qsens.configs.decisions import scheme_name
from pytest_qsens.configs.simulated import simulated_as
from pytest_qsens.configs.write import TARGETS
from pytest_qsens.wording import count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pytest_qsens.configs.rules import Config, Decision, Problem

_HEADER = ["op", "type", "scheme", "simulated as", "rule"]


def heading(config: Config, decisions: Sequence[Decision]) -> Iterator[str]:
    """Say what the file is, and how many ops get which scheme."""
    yield f"{config.path}: {config.about} (--format {config.format})"
    if decisions:
        schemes = Counter(scheme_name(decision.scheme) for decision in decisions)
        yield f"{len(decisions)} ops: " + ", ".join(f"{number} {name}" for name, number in schemes.most_common())


def rows(config: Config, decisions: Sequence[Decision]) -> list[list[str]]:
    """Table of the ops, or of the rules if there is no model."""
    if not decisions:
        listed = [
            (
                _printable(rule.label),
                "in part" if rule.partial else scheme_name(rule.scheme),
                rule.where.removeprefix(config.path).removeprefix(", "),
            )
            for rule in config.rules
        ]
        return [["rule", "scheme", "place"], *map(list, dict.fromkeys(listed))]
    return [_HEADER, *map(_row, decisions)]


def _row(decision: Decision) -> list[str]:
    simulated = "-" if decision.scheme is None else simulated_as(decision.scheme, decision.op)[0] or "cannot be"
    rule = "(none)" if decision.rule is None else _printable(decision.rule.label)
    return [decision.op.name, decision.op.type, scheme_name(decision.scheme), simulated, rule]


def trouble(problems: Sequence[Problem]) -> Iterator[str]:
    """Everything that is wrong."""
    if problems:
        yield f"{count(len(problems), 'problem')}; with --strict they are errors:"
        yield from (f"  {problem}" for problem in problems)
    else:
        yield "no problems"


def written(target: str | None, path: Path | None) -> Iterator[str]:
    """Say what was written, and what of it the file does not say."""
    if target is not None:
        yield ""
        yield f"wrote {path}: {target}"
        if TARGETS[target].exclusions:
            yield "  it says which ops are not quantized, and nothing of how the others are"


def _printable(text: str) -> str:
    """Escape what a terminal would take for more than text."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
